"""The train state: how far a run is and how its loss goes; saved with every checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from p828.data.loader import DIGESTS, Batch

USUAL_STEPS = 20  # that the usual loss is a mean of, with weights that fall off


@dataclass(frozen=True)
class BatchStats:
    """What a step's micro-batches hold."""

    targets: int
    documents: int
    cut_documents: int
    digest: int
    """Of the rows, as `Batch.digest`."""
    by_source: tuple[int, ...]
    """Targets."""
    epoch: int = 0
    """The latest epoch that a row belongs to; the first epoch is 0."""
    attended_pairs: int = 0
    """As `Batch.attended_pairs`."""

    @staticmethod
    def of(batches: Sequence[Batch], sources: int) -> "BatchStats":
        by_source = [0] * sources
        for batch in batches:
            for source, targets in enumerate(batch.source_targets):
                by_source[source] += targets
        return BatchStats(
            sum(batch.num_targets for batch in batches),
            sum(batch.documents for batch in batches),
            sum(batch.cut_documents for batch in batches),
            sum(batch.digest for batch in batches) % DIGESTS,
            tuple(by_source),
            max((batch.epoch for batch in batches), default=0),
            sum(batch.attended_pairs for batch in batches),
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
    bad_steps: int = 0
    """In a row, with non-finite ones and spikes of the loss."""
    usual_loss: float | None = None
    """A mean of late, of steps that were not bad."""
    usual_steps: int = 0
    """How many it is a mean of."""
    rollbacks: int = 0
    source_tokens: list[int] = field(default_factory=list)
    """Targets trained on so far, for each source of the mixture."""
    documents: int = 0
    """Documents trained on to their end."""
    cut_documents: int = 0
    """Those of them that had parts in several rows."""

    def count(self, counts: BatchStats) -> None:
        """Add what a step was trained on."""
        by_source = zip_longest(self.source_tokens, counts.by_source, fillvalue=0)
        self.source_tokens = [sum(counts) for counts in by_source]
        self.tokens += counts.targets
        self.documents += counts.documents
        self.cut_documents += counts.cut_documents

    def update(self, loss: float, applied: bool, spike_nats: float) -> None:
        """Take in a step's loss: it is a spike if it is so much above the usual."""
        self.loss = loss
        self.non_finite_steps = 0 if applied else self.non_finite_steps + 1
        is_spike = self.usual_loss is not None and loss > self.usual_loss + spike_nats
        if is_spike or not applied:
            self.bad_steps += 1
            return
        self.bad_steps = 0
        self.usual_steps = min(self.usual_steps + 1, USUAL_STEPS)
        before = loss if self.usual_loss is None else self.usual_loss
        self.usual_loss = before + (loss - before) / self.usual_steps
