"""How far a run is, and how well it goes: what its checkpoints save besides tensors and the place in the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from p828.data.batch import HASHES, Batch

EMA_STEPS = 20  # of the moving average of the loss; of fewer steps it is their plain mean
# Names that fields have in checkpoints of earlier versions.
RENAMED = {"bad_steps": "anomalous_steps", "usual_loss": "loss_ema", "usual_steps": "loss_ema_steps"}


@dataclass(frozen=True)
class BatchStats:
    """What a step's micro-batches hold."""

    targets: int
    documents: int
    split_documents: int
    hash: int
    """Of the rows, as `Batch.hash`."""
    by_source: tuple[int, ...]
    """Tokens, without padding."""
    rows: int = 0
    repeated_rows: int = 0
    """Rows that are in the step already, and are of the same epoch."""
    epoch: int = 0
    """The latest epoch that a row belongs to; the first epoch is 0."""
    attended_pairs: int = 0
    """As `Batch.attended_pairs`."""
    bad_records: int = 0
    """Malformed records that the run has passed over so far, on all ranks."""
    max_token: int = 0
    """Largest token id."""
    wait_seconds: float = 0.0
    """How long the rank that waited longest waited for its micro-batches."""

    @property
    def tokens(self) -> int:
        """Of all sources; of conversations more than there are targets."""
        return sum(self.by_source)

    @staticmethod
    def of(batches: Sequence[Batch], sources: int, wait_seconds: float = 0.0) -> "BatchStats":
        by_source = [0] * sources
        for batch in batches:
            for source, tokens in enumerate(batch.source_tokens):
                by_source[source] += tokens
        keys = [key for batch in batches for key in batch.row_keys]
        return BatchStats(
            sum(batch.num_targets for batch in batches),
            sum(batch.documents for batch in batches),
            sum(batch.split_documents for batch in batches),
            sum(batch.hash for batch in batches) % HASHES,
            tuple(by_source),
            rows=len(keys),
            repeated_rows=len(keys) - len(set(keys)),
            epoch=max((batch.epoch for batch in batches), default=0),
            attended_pairs=sum(batch.attended_pairs for batch in batches),
            max_token=max((batch.max_token for batch in batches), default=0),
            wait_seconds=wait_seconds,
        )


@dataclass
class TrainState:
    """Saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    saved_best_step: int | None = None
    """The best one that has a checkpoint: what was saved at `best_step` may have failed."""
    evaluations_since_best: int = 0
    non_finite_steps: int = 0
    """In a row."""
    anomalous_steps: int = 0
    """In a row: steps that were not finite or had a spike of the loss."""
    loss_ema: float | None = None
    """Exponential moving average of the loss, over steps that were not anomalous."""
    loss_ema_steps: int = 0
    """Steps that the average is over, at most `EMA_STEPS`."""
    rollbacks: int = 0
    source_tokens: list[int] = field(default_factory=list)
    """Tokens trained on so far, for each source of the mixture."""
    documents: int = 0
    """Documents trained on to their end."""
    cut_documents: int = 0
    """Those of them that were split over several samples."""

    def count(self, stats: BatchStats) -> None:
        """Count a step, and what it was trained on."""
        self.step += 1
        by_source = zip_longest(self.source_tokens, stats.by_source, fillvalue=0)
        self.source_tokens = [sum(counts) for counts in by_source]
        self.tokens += stats.tokens
        self.documents += stats.documents
        self.cut_documents += stats.split_documents

    def update(self, loss: float, applied: bool, spike_threshold: float) -> None:
        """Take in a step's loss. A spike is a loss above its moving average by more than the threshold, in nats."""
        self.loss = loss
        self.non_finite_steps = 0 if applied else self.non_finite_steps + 1
        is_spike = self.loss_ema is not None and loss > self.loss_ema + spike_threshold
        if is_spike or not applied:
            self.anomalous_steps += 1
            return
        self.anomalous_steps = 0
        self.loss_ema_steps = min(self.loss_ema_steps + 1, EMA_STEPS)
        before = loss if self.loss_ema is None else self.loss_ema
        self.loss_ema = before + (loss - before) / self.loss_ema_steps


def with_current_names(values: Any) -> Any:
    """A saved state whose fields have the names of an earlier version, with today's; any other value as it is."""
    if not isinstance(values, dict):
        return values
    return {name if RENAMED.get(name, name) in values else RENAMED[name]: value for name, value in values.items()}
