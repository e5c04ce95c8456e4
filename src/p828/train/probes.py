"""What a run tries out on its own model, to find faults that the loss does not show.

Each probe changes one thing that must not matter, and measures what the model makes of it: a number that is 0 but for
rounding if all is well. They use rows of the validation data, make forward passes as an evaluation does, and leave
weights, optimizer and random states as they are. All ranks make the same calls; what rank 0 finds is recorded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from p828.config import Config
from p828.data.batch import NO_TARGET, PADDING, Batch
from p828.data.fingerprints import SeenRows
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine, StepResult
from p828.inference.evaluate import evaluate, token_nats, uncompiled
from p828.model.transformer import Transformer
from p828.system.device import explain_out_of_memory
from p828.train.gradient_probes import auxiliary_gradient, rerouted_share
from p828.train.log.log import Log

Numbers = dict[str, float | None]
SHARE = 0.001  # of a start's time that the probes after its first ones may take
FIRST = 8  # probes of a start, made whatever they take


@dataclass
class Probes:
    """Makes the `probe` records: at the first step of a start, and with evaluations as often as their time allows."""

    config: Config
    validation: list[Batch]
    """The validation batches, the same on all ranks."""
    engine: Engine
    log: Log
    ranks: ProcessGroup

    def __post_init__(self) -> None:
        self.seen = SeenRows(self.validation)
        self._trained: Sequence[Batch] = ()  # this rank's micro-batches of the newest step
        self._expected: float | None = None
        self._made_at: int | None = None
        self._made, self._next = 0, 0.0

    def before_step(self, batches: Sequence[Batch], targets: int) -> None:
        """Before the first step of a start: find the loss that the step should record, of this rank's `batches`.

        `targets` counts those of all ranks. Not with dropout, which an evaluation leaves out.
        """
        if self._made_at is not None or not targets or self.config.model.dropout:
            return
        with self.log.console.waiting("evaluating the first step's rows"), self.engine.model_for_evaluation() as model:
            self._expected = evaluate(model, batches, self.engine.dtype, self.ranks.all_reduce).loss

    def note(self, batches: Sequence[Batch]) -> None:
        """Take in this rank's micro-batches of a step."""
        self._trained = batches
        self.seen.note(batches)

    def after_step(self, step: int, result: StepResult) -> None:
        """After the first step of a start: make the probes, with the loss that the step recorded."""
        if self._made_at is None:
            self.run(step, None if self._expected is None else abs(result.loss - self._expected))

    def run(self, step: int, loss_difference: float | None = None) -> None:
        """Make the probes and record them, unless it was done after this step, or takes too much of the run's time."""
        if self._made_at == step:
            return
        if self._made >= FIRST and self.ranks.on_rank_0(lambda: time.monotonic() < self._next):
            return
        self._made_at, started = step, time.monotonic()
        batch = next((batch for batch in self.validation if batch.num_targets), self.validation[0])
        with (
            explain_out_of_memory(f"the probes of step {step}"),
            self.log.console.waiting(f"step {step}: probing the model"),
            self.engine.model_for_evaluation() as model,
        ):
            numbers = self._leaks(model, batch) | self._gradients(model, batch)
        numbers["position_error"] = max(
            position_error(one, self.config.model.mask_documents) for one in (*self._trained, batch)
        )
        numbers["loss_difference"] = loss_difference
        seen = np.any(self.ranks.all_gather_object(self.seen.seen), axis=0)
        numbers["validation_overlap"] = self.seen.share(seen)
        self.log.probe(step, {name: number for name, number in numbers.items() if number is not None})
        self._made, ended = self._made + 1, time.monotonic()
        self._next = ended + (ended - started) / SHARE

    def _leaks(self, model: Transformer, batch: Batch) -> Numbers:
        dtype, masks = self.engine.dtype, self.config.model.mask_documents
        losses = [evaluate(model, [batch], dtype).loss for _ in range(2)] if batch.num_targets else [0.0, 0.0]
        numbers: Numbers = {"evaluation_difference": abs(losses[0] - losses[1])}
        starts_B = last_starts(batch) if masks else None
        if starts_B is not None:
            batch = divided(batch, starts_B)
        place_BS = torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS)
        nats_BS = token_nats(model, batch, dtype)

        def change(other: Batch, counts_BS: Tensor) -> float:
            """The largest change of a token's log-probability, of those that count."""
            return largest(token_nats(model, other, dtype) - nats_BS, counts_BS)

        is_later_BS = place_BS >= middles(batch)[:, None]
        numbers["future_leak"] = change(with_other_tokens(batch, is_later_BS), ~is_later_BS)
        if starts_B is not None:
            is_before_BS = place_BS < starts_B[:, None]
            numbers["document_leak"] = change(with_other_tokens(batch, is_before_BS), ~is_before_BS)
        if len(batch.tokens_BS) > 1:
            flipped_BS = token_nats(model, reversed_rows(batch), dtype).flip(0)
            numbers["row_leak"] = largest(flipped_BS - nats_BS, torch.ones_like(is_later_BS))
            row = int((batch.targets_BS != NO_TARGET).sum(dim=1).argmax())
            with uncompiled(model):  # a batch of one is of a shape that nothing else has
                alone_1S = token_nats(model, with_one_row(batch, row), dtype)
            numbers["batch_leak"] = usual(alone_1S[0] - nats_BS[row], batch.targets_BS[row] != NO_TARGET)
        return numbers

    def _gradients(self, model: Transformer, batch: Batch) -> Numbers:
        """What takes a backward pass. At ZeRO stage 3 DeepSpeed's hooks would take it for one of training."""
        numbers: Numbers = {}
        if self.engine.is_sharded:
            return numbers
        balance = self.config.balance
        if balance.sequence_loss_weight or balance.z_loss_weight:
            numbers["aux_gradient"] = auxiliary_gradient(model, batch, balance, self.engine.dtype)
        if self.config.train.gradient_checkpointing:
            numbers["reroute"] = rerouted_share(model, batch, self.engine.dtype)
        return numbers


def position_error(batch: Batch, mask_documents: bool) -> int:
    """How far a token's position is from its place in the row, or in its document with `mask_documents`, at most.

    Attention sees differences of positions only, so positions that run on from row to row change no log-probability:
    nothing else shows them.
    """
    place_BS = torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS)
    if mask_documents:
        begins_BS = torch.zeros_like(place_BS, dtype=torch.bool)
        begins_BS[:, 1:] = batch.document_ids_BS[:, 1:] != batch.document_ids_BS[:, :-1]
        place_BS = place_BS - place_BS.where(begins_BS, 0).cummax(dim=1).values
    error_BS = (batch.positions_BS - place_BS).abs()
    return int(error_BS.where(batch.document_ids_BS != PADDING, 0).max())


def last_starts(batch: Batch) -> Tensor:
    """Where each row's last document begins, int64 (B,); the row's middle where there is one document."""
    ids_BS = batch.document_ids_BS
    begins_BS = (ids_BS[:, 1:] != ids_BS[:, :-1]) & (ids_BS[:, 1:] != PADDING)
    last_B = (torch.arange(1, ids_BS.shape[1]) * begins_BS).amax(dim=1)
    return last_B.where(last_B > 0, (ids_BS != PADDING).sum(dim=1) // 2)


def divided(batch: Batch, starts_B: Tensor) -> Batch:
    """The batch with a document that begins at `starts_B` in each row, where the row does not have it yet."""
    ids_BS, positions_BS = batch.document_ids_BS.clone(), batch.positions_BS.clone()
    for ids_S, positions_S, start in zip(ids_BS, positions_BS, starts_B.tolist(), strict=True):
        if start and ids_S[start] == ids_S[start - 1]:
            ids_S[start:][ids_S[start:] != PADDING] += 1
            positions_S[start:] -= positions_S[start].item()
    return replace(batch, document_ids_BS=ids_BS, positions_BS=positions_BS)


def middles(batch: Batch) -> Tensor:
    """The middle of each row's longest document, int64 (B,), so that tokens of it come before and after."""
    found = []
    for ids_S in batch.document_ids_BS:
        ids, lengths = ids_S.unique_consecutive(return_counts=True)
        lengths = lengths.where(ids != PADDING, 0)
        longest = int(lengths.argmax())
        found.append(int(lengths[:longest].sum() + lengths[longest] // 2))
    return torch.tensor(found)


def with_other_tokens(batch: Batch, is_changed_BS: Tensor) -> Batch:
    """The batch with another token of the vocabulary at each of these places, and the targets as they are."""
    return replace(batch, tokens_BS=torch.where(is_changed_BS, (batch.tokens_BS - 1).abs(), batch.tokens_BS))


def reversed_rows(batch: Batch) -> Batch:
    """The same rows, the last one first."""
    tensors = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.document_ids_BS)
    tokens, targets, positions, ids = (tensor.flip(0) for tensor in tensors)
    return replace(batch, tokens_BS=tokens, targets_BS=targets, positions_BS=positions, document_ids_BS=ids)


def with_one_row(batch: Batch, row: int) -> Batch:
    """A batch of one of the rows alone."""
    tensors = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.document_ids_BS)
    tokens, targets, positions, ids = (tensor[row : row + 1] for tensor in tensors)
    return replace(batch, tokens_BS=tokens, targets_BS=targets, positions_BS=positions, document_ids_BS=ids)


def usual(change_S: Tensor, counts_S: Tensor) -> float | None:
    """The median absolute number of those that count; None if none does.

    Among other rows a matrix product may be rounded otherwise, and a token on the edge between two experts goes to the
    other one: this changes a few tokens by much, and wrong positions change most of them.
    """
    counted_N = change_S.abs()[counts_S.to(change_S.device)]
    return float(counted_N.median().item()) if len(counted_N) else None


def largest(change_BS: Tensor, counts_BS: Tensor) -> float:
    """The largest absolute number of those that count; NaN if one of them is."""
    return float(change_BS.abs().where(counts_BS.to(change_BS.device), 0.0).max().item())
