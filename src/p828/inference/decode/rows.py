"""What a step needs to know of every slot's sequence, on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p828.inference.decode.sequence import DecodedSequence
from p828.inference.sampling import RowSettings, choose_tokens, likeliest_tokens, row_settings, uniform_numbers
from p828.inference.sampling_config import Drawing


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's memory on a device; the host does not wait for what the device is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


class Rows:
    """Slot by slot, and of one slot more: the newest token, its position, and how the next one is drawn."""

    def __init__(self, slots: int, max_length: int, vocab_size: int, device: torch.device) -> None:
        self.device, self.max_length, self.vocab_size = device, max_length, vocab_size
        self.token_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.position_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        one = torch.ones(slots + 1, 1, device=device)
        self.settings_S = RowSettings(one * 0, one.long() * 0, one.clone(), one * 0, one.clone())
        self.uniform_SC = torch.zeros(slots + 1, max_length, device=device)
        self.seen_SV: Tensor | None = None
        """bool: tokens under the repetition penalty; made for the first sequence that has one."""
        self._true = torch.ones((), dtype=torch.bool, device=device)  # a CUDA graph takes no number of the host's

    def begin(self, sequence: DecodedSequence, prompt: Sequence[int]) -> None:
        """Note how a sequence draws. The EOS that stands for a document's beginning is under no penalty."""
        slot, config = sequence.slot, sequence.config
        for ours, theirs in zip(self.settings_S, row_settings([config], torch.device("cpu")), strict=True):
            ours[slot] = on_device(theirs, self.device)[0]
        self.draw(sequence)
        if config.repetition_penalty != 1:
            seen_SV = self.made_seen()
            seen_SV[slot] = False
            seen_SV[slot].index_fill_(
                0, on_device(torch.tensor(sorted(set(prompt)), dtype=torch.int64), self.device), True
            )

    def draw(self, sequence: DecodedSequence) -> None:
        """The numbers that a sequence's tokens are drawn by, of which those that it dropped had the first ones."""
        if not sequence.config.greedy:
            end = sequence.last_length
            numbers = uniform_numbers(sequence.seed, end, sequence.dropped)
            self.uniform_SC[sequence.slot, :end] = on_device(numbers, self.device)

    def made_seen(self) -> Tensor:
        """`seen_SV`, made if it is not there yet."""
        if self.seen_SV is None:
            shape = (len(self.token_S), self.vocab_size)
            self.seen_SV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self.seen_SV

    def place(self, slots_T: Tensor, positions_T: Tensor) -> None:
        """Say where the newest tokens of some slots will lie: a position each, or one for all."""
        self.position_S[slots_T] = positions_T

    def choose(self, logits_TV: Tensor, slots_T: Tensor, drawing: Drawing) -> Tensor:
        """The next token of each row, which is then its slot's newest, one position further: int64 (T,).

        `logits_TV` (float32) are those after the newest tokens. A row's token is −1 as `choose_tokens` says.
        """
        position_T = (self.position_S[slots_T] + 1).clamp(max=self.max_length - 1)
        if drawing.draws:
            settings = RowSettings(*(values_S[slots_T] for values_S in self.settings_S))
            seen_TV = self.seen_SV[slots_T] if drawing.has_penalty and self.seen_SV is not None else None
            uniform_T = self.uniform_SC[slots_T, position_T]
            token_T = choose_tokens(logits_TV, settings, uniform_T, seen_TV, drawing.has_filters)
        else:
            token_T = likeliest_tokens(logits_TV)
        if drawing.has_penalty and self.seen_SV is not None:
            self.seen_SV.index_put_((slots_T, token_T.clamp(min=0)), self._true)
        self.token_S[slots_T] = token_T.clamp(min=0)
        self.position_S[slots_T] = position_T
        return token_T

    def newest_of(self, slots: list[int]) -> NDArray[np.int64]:
        """Their newest tokens. On a CPU."""
        return self.token_S.numpy()[slots]

    def add(self, token_T: NDArray[np.int64], slots: list[int], positions: list[int]) -> None:
        """Make tokens (−1: none) their slots' newest, at these positions, as `choose` does. On a CPU."""
        self.token_S.numpy()[slots] = np.maximum(token_T, 0)
        self.position_S.numpy()[slots] = np.minimum(positions, self.max_length - 1)


def drawing_of(sequences: Sequence[DecodedSequence]) -> Drawing:
    """What some of them needs."""
    kinds = {sequence.config.drawing for sequence in sequences}
    return Drawing(*map(any, zip(*kinds, strict=True)))
