"""What a decoder starts on the device: reading a piece of a prompt, and a step of several sequences."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.inference.decode.cached_layers import CachedAttention, cached_hidden
from p828.inference.decode.rows import Rows, drawing_of, on_device
from p828.inference.decode.sequence import MOST_LIKELIEST, DecodedSequence, TokenProbability
from p828.model.backend import AttentionBackend, attention_backend
from p828.model.transformer import Transformer

PROMPT_LOGITS = 256  # tokens of a prompt whose probabilities are computed at a time


class Probabilities(NamedTuple):
    """Log-probabilities of some tokens, and the likeliest with theirs."""

    value_T: Tensor
    likeliest_TX: Tensor
    likeliest_value_TX: Tensor

    def list(self, likeliest: Sequence[int]) -> list[TokenProbability]:
        rows = zip(
            self.value_T.tolist(), self.likeliest_TX.tolist(), self.likeliest_value_TX.tolist(), likeliest, strict=True
        )
        return [
            TokenProbability(value, tuple(zip(tokens[:count], values[:count], strict=True)))
            for value, tokens, values, count in rows
        ]


def probabilities(logits_TV: Tensor, token_T: Tensor) -> Probabilities:
    logs_TV = logits_TV.log_softmax(dim=-1)
    likeliest = logs_TV.topk(min(MOST_LIKELIEST, logs_TV.shape[1]), dim=-1)
    value_T = logs_TV.gather(1, token_T.clamp(min=0)[:, None])[:, 0]
    return Probabilities(value_T, likeliest.indices, likeliest.values)


def wants_probabilities(sequences: Sequence[DecodedSequence]) -> bool:
    return any(sequence.wants.probability or sequence.wants.likeliest for sequence in sequences)


class Flight(NamedTuple):
    """A step on its way: a token of each sequence, and what some of them want beside it."""

    sequences: Sequence[DecodedSequence]
    token_T: Tensor
    probabilities: Probabilities | None
    experts_LTK: Tensor | None
    arrival: torch.cuda.Event | None
    """When these tensors, on the host, are filled; of steps that were started at once, when the last one's are."""
    places: Sequence[int] | None = None
    """Where in `token_T` the sequences' tokens lie; None: one after another."""

    def results(
        self,
    ) -> Iterator[tuple[DecodedSequence, int, TokenProbability | None, tuple[tuple[int, ...], ...] | None]]:
        """Each sequence's token, with what it wants beside it. Waits for the device."""
        if self.arrival is not None:
            self.arrival.synchronize()
        # By NumPy, which finds a few numbers in a tenth of the time.
        tokens = (self.token_T if self.places is None else self.token_T.numpy()[self.places]).tolist()
        if self.probabilities is None and self.experts_LTK is None:
            yield from zip(self.sequences, tokens, repeat(None), repeat(None))
            return
        counts = [sequence.wants.likeliest for sequence in self.sequences]
        found = None if self.probabilities is None else self.probabilities.list(counts)
        experts = None if self.experts_LTK is None else self.experts_LTK.transpose(0, 1).tolist()
        for row, sequence in enumerate(self.sequences):
            wants = sequence.wants
            probability = found[row] if found is not None and (wants.probability or wants.likeliest) else None
            chosen = tuple(map(tuple, experts[row])) if experts is not None and wants.experts else None
            yield sequence, tokens[row], probability, chosen


def on_host(
    token_T: Tensor, found: Probabilities | None, experts_LTK: Tensor | None
) -> tuple[Tensor, Probabilities | None, Tensor | None, torch.cuda.Event | None]:
    """The same on the host, and when they are there: the host does not wait."""
    if token_T.device.type != "cuda":
        return token_T, found, experts_LTK, None

    def fetched(values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    token_T = fetched(token_T)
    found = None if found is None else Probabilities(*map(fetched, found))
    experts_LTK = None if experts_LTK is None else fetched(experts_LTK)
    arrival = torch.cuda.Event()
    arrival.record()
    return token_T, found, experts_LTK, arrival


class PlainSteps:
    """Plain code, for any device and dtype."""

    runs_behind = False
    """Whether the next step is worth starting before this one's tokens are known."""

    def __init__(self, model: Transformer, cache: SlotCache, rows: Rows, vocab_size: int, dtype: torch.dtype) -> None:
        self.model, self.cache, self.rows, self.vocab_size, self.dtype = model, cache, rows, vocab_size, dtype
        self.device = model.head_weight.device
        backend = attention_backend(model.config, self.device, dtype)
        self.backend: AttentionBackend = "reference" if backend == "flash_triton" else backend

    def prepare(self) -> None:
        """Do what would be done when a size is first met: nothing here."""

    @torch.no_grad()
    def read(self, sequences: Sequence[DecodedSequence], begin: int, end: int) -> Flight | None:
        """Read tokens `begin` to `end` of a context that all of them have, in the first one's slot.

        If these are the last, the others get a copy, and each its next token.
        """
        first = sequences[0]
        hidden_SH = self.hidden_of_piece(first, begin, end)
        if first.wants.prompt and not first.dropped:
            self._note_probabilities(first, hidden_SH, begin, end)
        return self.first_tokens(sequences, self.logits(hidden_SH[-1:])) if end == first.read_length else None

    def first_tokens(self, sequences: Sequence[DecodedSequence], logits_1V: Tensor) -> Flight:
        """The next token of each after what they have in common, which is read in the first one's slot."""
        first, *others = sequences
        slots_T = on_device(torch.tensor([sequence.slot for sequence in sequences]), self.device)
        if others:
            self.cache.copy(first.slot, slots_T[1:], first.read_length)
        for other in others:
            other.prompt_probabilities = first.prompt_probabilities
        self.rows.place(slots_T, on_device(torch.tensor([first.read_length - 1]), self.device))
        logits_TV = logits_1V.expand(len(sequences), -1)
        return self.flight(sequences, self.rows.choose(logits_TV, slots_T, drawing_of(sequences)), logits_TV, None)

    @torch.no_grad()
    def continue_(
        self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], may_be_several: bool
    ) -> Sequence[Flight]:
        """A step of sequences that are read, and have `lengths` tokens, those on their way among them.

        Or several steps, one after another, for which each sequence has room.
        """
        slots = [sequence.slot for sequence in sequences]
        slots_T = torch.tensor(slots, device=self.device)
        positions_T = self.rows.position_S[slots_T]
        attended = CachedAttention(self.cache, self.backend, self.device, slots, positions_T[:, None], max(lengths))
        hidden_T1H, experts_LTK = cached_hidden(
            self.model, self.rows.token_S[slots_T][:, None], positions_T[:, None], attended, self.dtype
        )
        logits_TV = self.logits(hidden_T1H[:, 0])
        token_T = self.rows.choose(logits_TV, slots_T, drawing_of(sequences))
        return [self.flight(sequences, token_T, logits_TV, experts_LTK)]

    def hidden_of_piece(self, sequence: DecodedSequence, begin: int, end: int) -> Tensor:
        """(end − begin, H), and the piece's keys and values in the cache."""
        tokens_1S = torch.tensor([sequence.context[begin:end]], device=self.device)
        positions_1S = torch.arange(begin, end, device=self.device)[None]
        attended = CachedAttention(self.cache, self.backend, self.device, [sequence.slot], positions_1S, end)
        return cached_hidden(self.model, tokens_1S, positions_1S, attended, self.dtype)[0][0]

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """float32 (T, V) of the tokens that may come."""
        return self.model.logits(hidden_TH)[:, : self.vocab_size]

    def flight(
        self,
        sequences: Sequence[DecodedSequence],
        token_T: Tensor,
        logits_TV: Tensor | None,
        experts_LTK: Tensor | None,
    ) -> Flight:
        """Logits may be left out where no sequence wants probabilities."""
        found = None
        if wants_probabilities(sequences):
            assert logits_TV is not None
            found = probabilities(logits_TV, token_T)
        if not any(sequence.wants.experts for sequence in sequences):
            experts_LTK = None
        return Flight(sequences, *on_host(token_T, found, experts_LTK))

    def _note_probabilities(self, sequence: DecodedSequence, hidden_SH: Tensor, begin: int, end: int) -> None:
        """Those of the prompt's tokens behind the ones just read."""
        if begin == 0:
            sequence.prompt_probabilities.append(None)
        following = sequence.ids[begin + 1 : min(end + 1, sequence.prompt_length)]
        for first in range(0, len(following), PROMPT_LOGITS):
            tokens = following[first : first + PROMPT_LOGITS]
            logits_TV = self.logits(hidden_SH[first : first + len(tokens)])
            found = probabilities(logits_TV, torch.tensor(tokens, device=self.device))
            sequence.prompt_probabilities += found.list([sequence.wants.likeliest] * len(tokens))
