"""Steps on a GPU: CUDA graphs of the decoding kernels, and a prompt's first piece one of the training kernels.

A graph is captured when its kind is first met. Sizes are few: the sequences of a step are filled up by rows that stand
for none, and the tokens of a piece by tokens that nobody reads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.inference.decode.cached_layers import FlashAttention, cached_hidden
from p828.inference.decode.kernel_step import kernel_step
from p828.inference.decode.rows import Rows, drawing_of, on_device
from p828.inference.decode.sequence import DecodedSequence
from p828.inference.decode.steps import Flight, PlainSteps
from p828.inference.decode.weights import decode_weights
from p828.inference.sampling_config import Drawing
from p828.kernels.decode import ops
from p828.model.transformer import Transformer

Result = TypeVar("Result")
DRAWN = Drawing(draws=True, has_filters=False, has_penalty=False)  # its kernel takes likeliest tokens, too
FILTERED = Drawing(draws=True, has_filters=True, has_penalty=False)
PENALISED = Drawing(draws=True, has_filters=True, has_penalty=True)
DRAWINGS = DRAWN, FILTERED, PENALISED
SMALLEST_PIECE = 64  # tokens that a graph of a piece has at least
FEW_LAYERS = 4  # of a model that may be over with a step before the host has started the next
STEPS_AT_ONCE = 4  # of such a model; more would only delay who comes, and go on behind the ends of texts


class CapturedPiece(NamedTuple):
    """The graph of a prompt's first piece of up to a number of tokens."""

    graph: torch.cuda.CUDAGraph
    tokens_1S: Tensor
    slot_1: Tensor
    last_1: Tensor
    """Where the piece's last token is."""
    hidden_SH: Tensor
    logits_1V: Tensor


class StepKind(NamedTuple):
    """What a graph of steps is captured for."""

    rows: int
    drawing: Drawing
    steps: int = 1
    """One after another."""


class CapturedStep(NamedTuple):
    """A graph of steps, and what the last one leaves."""

    graph: torch.cuda.CUDAGraph
    slots_T: Tensor
    logits_TV: Tensor
    token_T: Tensor
    experts_LTJ: list[Tensor]


class CapturedSteps(PlainSteps):
    """bfloat16 on a GPU."""

    runs_behind = True

    def __init__(
        self, model: Transformer, cache: SlotCache, rows: Rows, vocab_size: int, dtype: torch.dtype, piece: int
    ) -> None:
        """`piece` is the most tokens of a piece."""
        super().__init__(model, cache, rows, vocab_size, dtype)
        self.weights = decode_weights(model, vocab_size, dtype)
        self.longest_piece = piece
        self.at_once = STEPS_AT_ONCE if len(model.layers) <= FEW_LAYERS else 1
        self._pieces: dict[int, CapturedPiece] = {}
        self._steps: dict[StepKind, CapturedStep] = {}
        self._slots_of: dict[int, list[int]] = {}
        """What lies in each size's `slots_T`."""
        self._slots_T: dict[int, Tensor] = {}
        self._arrivals_TG = torch.zeros(
            2 * cache.slots, model.config.num_key_value_heads, dtype=torch.int32, device=self.device
        )
        self._told_SC = torch.zeros(
            cache.slots + 1, cache.max_length, dtype=torch.int32, pin_memory=self.device.type == "cuda"
        )
        """On the host: the tokens that kernels chose, by slot and position. A copy after each graph takes longer."""
        self._pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def read(self, sequences: Sequence[DecodedSequence], begin: int, end: int) -> Flight | None:
        first = sequences[0]
        hidden_SH, logits_1V = self._read_first(first, end) if begin == 0 else self._read_later(first, begin, end)
        if first.wants.prompt and not first.dropped:
            self._note_probabilities(first, hidden_SH, begin, end)
        return self.first_tokens(sequences, logits_1V) if end == first.read_length else None

    @torch.no_grad()
    def continue_(
        self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], may_be_several: bool
    ) -> Sequence[Flight]:
        size = min(_power_of_two(len(sequences)), self.cache.slots)
        drawing = drawing_of(sequences)
        wants = {sequence.wants for sequence in sequences}
        is_told = not drawing.has_filters and not any(
            want.probability or want.likeliest or want.experts for want in wants
        )
        count = self.at_once if is_told and may_be_several and has_room(sequences, lengths, self.at_once) else 1
        step = self._step(StepKind(size, drawing if drawing.has_filters else DRAWN, count))
        slots = [sequence.slot for sequence in sequences]
        if self._slots_of[size] != slots:
            filled = slots + [self.cache.scratch] * (size - len(slots))
            step.slots_T.copy_(self._on_device(filled))
            self.rows.position_S[-1:].zero_()  # of the scratch slot, which would read ever more keys
            self._slots_of[size] = slots
        step.graph.replay()
        if is_told:
            return self._told(sequences, lengths, count)
        rows, experts_LTK = slice(len(sequences)), None
        if any(want.experts for want in wants):
            experts_LTK = torch.stack(step.experts_LTJ)[:, rows, : self.model.config.num_experts_per_tok]
        return [self.flight(sequences, step.token_T[rows], step.logits_TV[rows], experts_LTK)]

    def _told(self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], count: int) -> Sequence[Flight]:
        """Of steps that have just been started, whose tokens come into `told_SC`."""
        arrival = torch.cuda.Event()
        arrival.record()
        told, context = self._told_SC.view(-1), self.cache.max_length
        places = [sequence.slot * context + length for sequence, length in zip(sequences, lengths, strict=True)]
        return [
            Flight(sequences, told, None, None, arrival, [place + done for place in places]) for done in range(count)
        ]

    @torch.no_grad()
    def prepare(self) -> None:
        """Capture what may be met."""
        self.rows.made_seen()
        for size in _powers_of_two(1, self.cache.slots):
            self._step(StepKind(size, DRAWN, self.at_once))
            for drawing in DRAWINGS:
                self._step(StepKind(size, drawing))
        for size in _powers_of_two(min(SMALLEST_PIECE, self.longest_piece), self.longest_piece):
            self._piece(size)

    def _step(self, kind: StepKind) -> CapturedStep:
        if kind not in self._steps:
            self._steps[kind] = self._capture_step(kind)
        return self._steps[kind]

    def _piece(self, size: int) -> CapturedPiece:
        if size not in self._pieces:
            self._pieces[size] = self._capture_piece(size)
        return self._pieces[size]

    def _on_device(self, values: Sequence[int]) -> Tensor:
        """int64."""
        return on_device(torch.tensor(values), self.device)

    def _read_first(self, sequence: DecodedSequence, end: int) -> tuple[Tensor, Tensor]:
        """A prompt's first piece: hidden states, and logits after its last token."""
        piece = self._piece(min(max(_power_of_two(end), SMALLEST_PIECE), self.longest_piece))
        piece.tokens_1S[0, :end].copy_(self._on_device(sequence.context[:end]))
        piece.slot_1.copy_(self._on_device([sequence.slot]))
        piece.last_1.copy_(self._on_device([end - 1]))
        piece.graph.replay()
        return piece.hidden_SH[:end], piece.logits_1V

    def _read_later(self, sequence: DecodedSequence, begin: int, end: int) -> tuple[Tensor, Tensor]:
        tokens_1S = self._on_device(sequence.context[begin:end])[None]
        positions_1S = torch.arange(begin, end, device=self.device)[None]
        attended = FlashAttention(self.cache, self._on_device([sequence.slot]), positions_1S, begin, sequence.slot)
        hidden_SH = cached_hidden(self.model, tokens_1S, positions_1S, attended, self.dtype)[0][0]
        return hidden_SH, self.logits(hidden_SH[-1:])

    def _capture_piece(self, size: int) -> CapturedPiece:
        tokens_1S = torch.zeros(1, size, dtype=torch.int64, device=self.device)
        slot_1 = torch.full((1,), self.cache.scratch, dtype=torch.int64, device=self.device)
        last_1 = torch.zeros(1, dtype=torch.int64, device=self.device)

        def read() -> tuple[Tensor, Tensor]:
            positions_1S = torch.arange(size, device=self.device)[None]
            attended = FlashAttention(self.cache, slot_1, positions_1S, 0, None)
            hidden_SH = cached_hidden(self.model, tokens_1S, positions_1S, attended, self.dtype)[0][0]
            return hidden_SH, self.logits(hidden_SH[last_1])

        graph, (hidden_SH, logits_1V) = self._captured(read)
        return CapturedPiece(graph, tokens_1S, slot_1, last_1, hidden_SH, logits_1V)

    def _capture_step(self, kind: StepKind) -> CapturedStep:
        if kind.rows not in self._slots_T:
            self._slots_T[kind.rows] = torch.empty(kind.rows, dtype=torch.int64, device=self.device)
        slots_T = self._slots_T[kind.rows].fill_(self.cache.scratch)
        self._slots_of[kind.rows] = []

        def step() -> tuple[Tensor, Tensor, list[Tensor]]:
            rows = self.rows
            logits_TV, experts_LTJ = kernel_step(self.weights, self.model, self.cache, rows, self._arrivals_TG, slots_T)
            if kind.drawing.has_filters:
                return logits_TV, rows.choose(logits_TV, slots_T, kind.drawing), experts_LTJ
            token_T = ops.choose_tokens(
                logits_TV, slots_T, rows.settings_S.temperature, rows.uniform_SC, rows.token_S, rows.position_S,
                self._told_SC, self._arrivals_TG,
            )  # fmt: skip
            return logits_TV, token_T, experts_LTJ

        def steps() -> tuple[Tensor, Tensor, list[Tensor]]:
            for _ in range(kind.steps - 1):
                step()
            return step()

        graph, (logits_TV, token_T, experts_LTJ) = self._captured(steps)
        return CapturedStep(graph, slots_T, logits_TV, token_T, experts_LTJ)

    def _captured(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of what `run` starts, after a run that compiles its kernels; only the scratch slot is written to."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph, result


def has_room(sequences: Sequence[DecodedSequence], lengths: Sequence[int], tokens: int) -> bool:
    """Whether each of these lengths may become so much greater."""
    return all(sequence.last_length - length >= tokens for sequence, length in zip(sequences, lengths, strict=True))


def _power_of_two(count: int) -> int:
    """The first that is not below."""
    return 1 << (count - 1).bit_length()


def _powers_of_two(least: int, most: int) -> list[int]:
    """Those from `least` on that are below `most`, and `most`."""
    found = []
    while least < most:
        found.append(least)
        least *= 2
    return [*found, most]
