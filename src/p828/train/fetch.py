"""Fetching a step's micro-batches on every rank, and what the ranks have to agree on before each step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from p828.data.batch import HASHES, Batch
from p828.data.loader import Loader
from p828.data.order import bad_records, is_stopped
from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError, DataError, RunFailed, RunPaused, TransientReadError
from p828.runs.train_state import BatchStats, TrainState
from p828.system.device import peak_memory
from p828.train.checkpointing import Checkpointing
from p828.train.log.usage import Usage
from p828.train.signals import GracefulShutdown

MICRO = 1e6  # microseconds in a second


@dataclass
class Fetcher:
    """Hands out a step's micro-batches, with one all_gather in which the ranks agree on what they fetched.

    In it a rank also tells the others that it failed, was asked to stop, or has written its part of a checkpoint.
    """

    loader: Loader
    num_batches: int
    """Micro-batches in a step, on each rank."""
    num_sources: int
    usage: Usage
    checkpointing: Checkpointing
    device: torch.device
    ranks: ProcessGroup

    def fetch(self, state: TrainState, shutdown: GracefulShutdown) -> tuple[list[Batch], BatchStats]:
        """This rank's micro-batches of the step after `state`, and the statistics of those of all ranks.

        When a rank cannot read its own, or finds them malformed, or is asked to stop, the run is saved, and RunFailed
        or RunPaused raised on all of them.
        """
        position, batches, failure, started = self.loader.state_dict(), list[Batch](), "", time.perf_counter()
        try:
            batches = [next(self.loader) for _ in range(self.num_batches)]
        except (ConfigError, DataError, TransientReadError) as error:
            failure = str(error)
        rows_key = sum(key for batch in batches for key in batch.row_keys) % HASHES
        own = BatchStats.of(batches, self.num_sources, time.perf_counter() - started)
        about_ranks, stats = self._gather(own, rows_key, bool(failure), bool(shutdown.reason))
        self.usage.rank_memory_bytes = about_ranks.memory_bytes
        self.usage.trained_seconds = max(about_ranks.microseconds) / MICRO
        if all(about_ranks.is_written):
            self.checkpointing.finish(state)
        if any(about_ranks.has_failed) or any(about_ranks.is_asked_to_stop):
            self._end(state, position, failure, shutdown)
        return batches, stats

    def _gather(
        self, own: BatchStats, rows_key: int, has_failed: bool, is_asked_to_stop: bool
    ) -> tuple["_AboutRanks", BatchStats]:
        about = (
            rows_key,
            own.rows,
            own.repeated_rows,
            has_failed,
            is_asked_to_stop,
            self.checkpointing.is_written,
            peak_memory(self.device),
            self.usage.seconds() * MICRO,
        )
        sums = (own.attended_pairs, own.targets, own.documents, own.split_documents, own.hash, *own.by_source)
        bad = bad_records(self.loader.state_dict())  # so far, by stream: the rank that has read furthest knows most
        greatest = (own.epoch, own.max_token, own.wait_seconds * MICRO)
        numbers = [*about, *greatest, *sums, *bad]
        columns = [[int(n) for n in column] for column in zip(*self.ranks.all_gather(numbers), strict=True)]
        about_columns, rest = columns[: len(about)], columns[len(about) :]
        about_ranks = _AboutRanks(*about_columns)
        epoch, max_token, wait_microseconds = map(max, rest[: len(greatest)])
        rest = rest[len(greatest) :]
        pairs, targets, documents, split_documents, hash_sum, *by_source = map(sum, rest[: len(sums)])
        stats = BatchStats(
            targets,
            documents,
            split_documents,
            hash_sum % HASHES,
            tuple(by_source),
            sum(about_ranks.rows),
            rows_in_twice(about_ranks.rows_key, about_ranks.rows, about_ranks.repeated_rows),
            epoch=epoch,
            attended_pairs=pairs,
            bad_records=sum(map(max, rest[len(sums) :])),
            max_token=max_token,
            wait_seconds=wait_microseconds / MICRO,
        )
        return about_ranks, stats

    def _end(self, state: TrainState, position: dict[str, Any], failure: str, shutdown: GracefulShutdown) -> NoReturn:
        """End after the last step, saved: by RunPaused if a rank was asked to, else by RunFailed."""
        self.checkpointing.finish(state)
        # A checkpoint knows the file of the bad record again, so that the run goes on with the file mended.
        is_saved = self.checkpointing.saved_step == state.step
        if not is_saved or any(self.ranks.all_gather_object(is_stopped(position))):
            self.checkpointing.save(state, is_last=True, position=position)
        failure, reason = (
            next(filter(None, self.ranks.all_gather_object(text)), "") for text in (failure, shutdown.reason)
        )
        if reason:  # it may be why the data was not waited for
            where = f"after step {state.step}, which is saved; the same command goes on from there"
            raise self.ranks.on_all_ranks(RunPaused(f"stopped by {reason} {where}"))
        raise self.ranks.on_all_ranks(RunFailed(failure))


@dataclass
class _AboutRanks:
    """What the ranks tell each other before a step, by rank."""

    rows_key: list[int]
    """Sum of the rows' keys."""
    rows: list[int]
    repeated_rows: list[int]
    """Rows that the rank itself has already."""
    has_failed: list[int]
    is_asked_to_stop: list[int]
    is_written: list[int]
    """Whether the checkpoint on its way is written."""
    memory_bytes: list[int]
    microseconds: list[int]


def rows_in_twice(keys: Sequence[int], rows: Sequence[int], repeated: Sequence[int]) -> int:
    """Rows of a step that are in it already: on the same rank, or all of a rank that has those of a rank before it.

    By rank: the sum of its rows' keys, its rows, and those of them that it has already.
    """
    own = enumerate(zip(keys, rows, repeated, strict=True))
    return sum(twice if keys.index(key) == rank else count for rank, (key, count, twice) in own)
