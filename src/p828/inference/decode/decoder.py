"""Continue token ids in slots of one cache: each step gives every running sequence its next token.

The host starts a step before it knows what the last one gave: a step takes its tokens from the device, and what it
gives is fetched while the next one runs. A sequence that turns out to have ended was then continued by one token more
or, where short steps are started together, by some, which nobody sees.
"""

from collections import deque
from collections.abc import Collection, Sequence

import torch

from p828.errors import NotFinite
from p828.inference.decode.cache import SlotCache
from p828.inference.decode.captured_steps import CapturedSteps
from p828.inference.decode.cpu_steps import CpuSteps
from p828.inference.decode.rows import Rows
from p828.inference.decode.sequence import (
    KEPT,
    NOTHING_MORE,
    DecodedSequence,
    FinishReason,
    NewToken,
    Wants,
    sequence_of,
)
from p828.inference.decode.steps import Flight, PlainSteps
from p828.inference.sampling_config import SamplingConfig
from p828.model.backend import decode_dtype, has_decode_kernels
from p828.model.transformer import Transformer


def not_finite() -> NotFinite:
    """What to raise for a sequence that ended as `diverged`."""
    return NotFinite("the model's logits are not finite numbers: its weights diverged; take an earlier checkpoint")


class Decoder:
    """Sequences in slots, each continued as if it were alone. One thread uses it at a time.

    What a sequence gets does not depend on the others, but for the rounding of matrix products of another size.
    """

    def __init__(
        self,
        model: Transformer,
        vocab_size: int,
        eos_id: int,
        dtype: torch.dtype,
        slots: int,
        max_length: int | None = None,
        prefill_tokens: int = 2048,
    ) -> None:
        """Tokens are below `vocab_size`. A prompt is read in pieces of `prefill_tokens`.

        `dtype` is what the model is computed in elsewhere; the decoder computes in its `decode_dtype`.

        `max_length` is the most tokens of a prompt and its continuation, at most the model's context, which it is by
        default. The model is in evaluation mode, and its weights stay as they are.
        """
        context = model.config.max_position_embeddings
        self.max_length = context if max_length is None else min(max_length, context)
        self._eos_id, self._prefill_tokens = eos_id, prefill_tokens
        device = model.head_weight.device
        if model.weights_stay:  # else steps have no weights of their own, and cast those that come
            dtype = decode_dtype(device, dtype)
        self._steps: PlainSteps
        self._cache = SlotCache(model.config, slots, self.max_length, device, dtype)
        self._rows = Rows(slots, self.max_length, vocab_size, device)
        if not model.weights_stay:  # the others keep weights of their own, or where they lie
            self._steps = PlainSteps(model, self._cache, self._rows, vocab_size, dtype)
        elif has_decode_kernels(model.config, device, dtype):
            self._steps = CapturedSteps(
                model, self._cache, self._rows, vocab_size, dtype, min(prefill_tokens, self.max_length)
            )
        else:
            is_float32_on_cpu = device.type == "cpu" and dtype == torch.float32
            steps = CpuSteps if is_float32_on_cpu else PlainSteps
            self._steps = steps(model, self._cache, self._rows, vocab_size, dtype)
        self._unread: deque[DecodedSequence] = deque()
        """Sequences whose prompt, or context that slid, is still to be read, the first of them maybe in part."""
        self._read_tokens = 0
        """Of the first one's."""
        self._decoding: list[DecodedSequence] = []
        self._flights: deque[Flight] = deque()
        """Steps that were started, the oldest first."""
        self._running: list[DecodedSequence] = []

    @property
    def free_slots(self) -> int:
        return self._cache.free

    @property
    def running(self) -> list[DecodedSequence]:
        """Those that were admitted and have not ended."""
        return list(self._running)

    def admit(
        self,
        prompt: Sequence[int],
        config: SamplingConfig,
        seed: int,
        end_ids: Collection[int] = (),
        wants: Wants = NOTHING_MORE,
    ) -> DecodedSequence:
        """Give a prompt a slot; `step` does the work. It ends before EOS and before any of `end_ids`.

        An empty prompt begins a document. Raises ValueError when no slot is free, a number in the prompt is no token's,
        or it is not shorter than `max_length` and the context may not slide.
        """
        if not self.free_slots:
            raise ValueError("no slot is free")
        is_too_long = len(prompt) >= self.max_length
        if is_too_long and not self._slides(config):
            raise ValueError(f"a prompt of {len(prompt)} tokens: at most {self.max_length - 1} fit")
        if prompt and not 0 <= min(prompt) <= max(prompt) < self._rows.vocab_size:
            raise ValueError(f"token ids from 0 to {self._rows.vocab_size - 1} are accepted")
        sequence = sequence_of(prompt, self._eos_id, config, seed, end_ids, wants, self._cache.take(), self.max_length)
        if is_too_long:
            sequence.slide()
        self._unread.append(sequence)
        self._running.append(sequence)
        self._rows.begin(sequence, prompt)  # last: if it finds no memory, the sequence can be cancelled
        return sequence

    def prepare(self) -> None:
        """Do beforehand what would be done when a number of sequences or a prompt's length is first met.

        On a GPU that is a second and more for each.
        """
        self._steps.prepare()

    def step(self) -> list[NewToken]:
        """Read a piece of one prompt, give every sequence that is read its next token, and tell of known ones.

        Where a step is short and no prompt is read, every sequence gets a few tokens at once.
        """
        waiting, reads = len(self._flights), bool(self._unread)
        if reads:
            self._read_piece()
        rows, lengths = [], []
        for sequence in self._decoding:
            length = sequence.context_length + sequence.on_its_way
            if length < sequence.last_length:
                rows.append(sequence)
                lengths.append(length)
        if rows:
            for flight in self._steps.continue_(rows, lengths, may_be_several=not reads):
                self._start(flight, rows)
        keep = len(self._flights) - waiting if self._steps.runs_behind and self._flights else 0
        tokens: list[NewToken] = []
        while len(self._flights) > keep:
            tokens += self._arrive(self._flights.popleft())
        return tokens

    def cancel(self, sequence: DecodedSequence) -> None:
        """Free the slot of a running sequence; its tokens on the way are dropped."""
        assert sequence.finish_reason is None, sequence
        sequence.finish_reason = "stop"
        self._leave(sequence)

    def check_idle(self) -> None:
        """Assert what holds when nothing runs."""
        assert not self._running, "sequences are left"
        assert not self._unread, "prompts are left"
        assert not self._decoding, "continuations are left"
        assert self._cache.free == self._cache.slots, "slots are lost"
        for flight in self._flights:
            assert all(sequence.finish_reason is not None for sequence in flight.sequences), "a step is on its way"

    def _read_piece(self) -> None:
        """Of the first unread one, a prompt once for all sequences that have it."""
        first = self._unread[0]
        alike = [first]
        if not first.dropped:
            alike = [one for one in self._unread if one.ids == first.ids and one.wants == first.wants]
        begin = self._read_tokens
        end = min(begin + self._prefill_tokens, first.read_length)
        flight = self._steps.read(alike, begin, end)
        self._read_tokens = end
        if flight is not None:
            for sequence in alike:
                self._unread.remove(sequence)
            self._read_tokens = 0
            self._decoding += alike
            self._start(flight, alike)

    def _start(self, flight: Flight, sequences: Sequence[DecodedSequence]) -> None:
        self._flights.append(flight)
        for sequence in sequences:
            sequence.on_its_way += 1

    def _arrive(self, flight: Flight) -> list[NewToken]:
        found = []
        for sequence, token, probability, experts_LK in flight.results():
            if sequence.finish_reason is not None:  # it ended by an earlier token, or was cancelled
                continue
            sequence.on_its_way -= 1
            reason = self._take(sequence, token)
            found.append(NewToken(sequence, token, reason, probability, experts_LK))
            if reason is not None:
                sequence.finish_reason = reason
                self._leave(sequence)
        return found

    def _take(self, sequence: DecodedSequence, token: int) -> FinishReason | None:
        """Add a token; why it is the last one, if it is."""
        if token < 0:
            self._cache.clear(sequence.slot)  # of what is not finite, for the next sequence in it
            return "diverged"
        if token in sequence.end_ids:
            return "end"
        sequence.ids.append(token)
        if sequence.context_length < sequence.last_length:
            return None
        if len(sequence.ids) == sequence.prompt_length + sequence.config.max_new_tokens:
            return "length"
        if not self._slides(sequence.config):
            return "context"
        self._slide(sequence)
        return None

    def _slides(self, config: SamplingConfig) -> bool:
        return config.slide and self.max_length > KEPT + 1

    def _slide(self, sequence: DecodedSequence) -> None:
        """Make room, and have what stays read again: at other positions, and without what is dropped, keys differ."""
        sequence.slide()
        self._rows.draw(sequence)
        self._decoding.remove(sequence)
        self._unread.append(sequence)

    def _leave(self, sequence: DecodedSequence) -> None:
        if sequence in self._unread:
            if sequence is self._unread[0] and self._read_tokens:
                self._read_tokens = 0
                self._cache.clear(sequence.slot)  # no logits have told yet whether what it left is finite
            self._unread.remove(sequence)
        if sequence in self._decoding:
            self._decoding.remove(sequence)
        self._running.remove(sequence)
        self._cache.give_back(sequence.slot)
