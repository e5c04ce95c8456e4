"""When a run saves a checkpoint, and how: a thread writes a copy of the state while training goes on."""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p828.config import Config
from p828.config.values import to_dict
from p828.data.loader import Loader
from p828.data.order import merged
from p828.data.retry import Retry
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine
from p828.errors import RunFailed
from p828.runs import checkpoint
from p828.runs.checkpoint import OpenCheckpoint
from p828.runs.checkpoint_content import check_content
from p828.runs.tensors import Saveable, tensors_of, with_tensors
from p828.runs.train_state import TrainState
from p828.system.device import machine
from p828.system.host_memory import free_host_bytes
from p828.train.checkpoint_writer import CheckpointWriter, num_bytes
from p828.train.log.log import Log
from p828.train.log.usage import Usage

Parts = Mapping[str, Mapping[str, Saveable]]
SPARE_BYTES = 2**30  # that a copy must leave free, on its device


class Checkpointing:
    """Saves a run's state, and reads it back: where a run is resumed, and where it is rolled back.

    Checkpoints are written one at a time, in the background. All ranks make the same calls.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        versions: dict[str, str],
        fingerprint: str,
        enclosed: Mapping[str, bytes],
        engine: Engine,
        loader: Loader,
        log: Log,
        usage: Usage,
        ranks: ProcessGroup,
    ) -> None:
        """Every checkpoint records config, versions and the tokenizer's fingerprint, and has the `enclosed` files."""
        self.directory, self.config = directory, config
        self.versions, self.fingerprint = versions, fingerprint
        self.engine, self.loader, self.log, self.usage, self.ranks = engine, loader, log, usage, ranks
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is complete."""
        self.retry = Retry(config.data.read_retries, report=log.console.event)
        """How checkpoints that cannot be read for now are waited for."""
        self._writer = AsyncCheckpointer(directory, ranks.new_group(), engine.device, enclosed)

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the checkpoint on its way is written."""
        return self._writer.is_written

    def save(self, state: TrainState, is_last: bool, position: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of `state`. `position` is the data's if that is not the one of the batch fetched last.

        No checkpoint is written while steps are flagged as anomalous and a rollback may follow. The last one is
        complete afterwards; others are written while the training goes on. If one of these fails, that is recorded and
        the run goes on, as a later one may succeed. Raises RunFailed if the last one fails.
        """
        self.finish(state)
        began = time.monotonic()
        if state.anomalous_steps and self.config.rollback.after_steps and not is_last:
            return
        best = state.step if state.best_step == state.step else state.saved_best_step
        content = {
            "progress": {**dataclasses.asdict(state), "saved_best_step": best},
            "data": merged(self.ranks.all_gather_object(position or self.loader.state_dict())),
            "config": to_dict(self.config),
            "versions": self.versions,
            "tokenizer": self.fingerprint,
            "ranks": self.ranks.size,
            "seconds": self.usage.seconds(),
        }
        try:
            is_written = self._writer.start(state.step, self.engine.state_dict(), content, began)
        except RunFailed as error:
            self._report_failure(error, state.step, is_last)
            return
        if is_written or is_last:
            self.finish(state, is_last)

    def finish(self, state: TrainState, is_last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is. Raises RunFailed as `save` does."""
        step = self._writer.step
        if step is None:
            return
        try:
            with self.log.console.waiting("waiting for the checkpoint to be written") if is_last else nullcontext():
                saved = self._writer.finish()
        except RunFailed as error:
            self._report_failure(error, state.step, is_last)
            return
        self.saved_step = step
        if state.best_step == step:
            state.saved_best_step = step
        self.log.event("saved", step, **saved._asdict())
        if self._writer.problem:
            self.log.event("not_deleted", state.step, self._writer.problem)
            self._writer.problem = ""
        self._writer.delete_old(self.config.checkpoint.keep_last, state.saved_best_step)

    def wait_for_deletion(self) -> None:
        """Wait until old checkpoints are deleted, which a thread does after each save."""
        self._writer.wait_for_deletion()

    def close(self) -> None:
        """Wait for the threads, whether their work succeeds or fails."""
        self._writer.join()
        self._writer.wait_for_deletion()

    def read_state(self, saved: OpenCheckpoint) -> TrainState:
        """How far the run was. Raises DamagedCheckpoint if the checkpoint's content cannot be this run's."""
        return check_content(saved, self.config, self.loader.state_dict(), self.engine.state_keys)

    def load_engine(self, path: Path) -> None:
        """Give the engine the weights, optimizer state and random states of a checkpoint that was checked."""
        with checkpoint.opened(path, retry=self.retry) as saved:
            self.engine.load_state_dict(saved.tensors)

    def _report_failure(self, error: RunFailed, step: int, is_last: bool) -> None:
        if is_last:
            raise error
        newest = "none yet" if self.saved_step is None else f"of step {self.saved_step}"
        self.log.event("not_saved", step, f"{error}. The run goes on; the newest checkpoint is {newest}")


class Saved(NamedTuple):
    """What a complete checkpoint has cost."""

    seconds: float
    """From the moment that training stopped for it to the end of writing."""
    waited: float
    """Blocking time in seconds: the part of them in which the host waited, or the device if its copy took longer."""
    copy_bytes: int
    """Bytes of the copy on this rank; 0 if there was no room for a copy, and training waited for the disk."""


class AsyncCheckpointer:
    """Writes one checkpoint at a time, by a thread and from a copy. All ranks make the same calls.

    `ranks` is a process group that nothing else uses, since the thread calls it too. The copies are kept from one
    checkpoint to the next, so that the memory they take is known after the first.
    """

    def __init__(
        self, directory: Path, ranks: ProcessGroup, device: torch.device, enclosed: Mapping[str, bytes] | None = None
    ) -> None:
        """`enclosed` are files, by name, that every checkpoint gets besides tensors and state."""
        self.directory, self.ranks, self.device = directory, ranks, device
        self.enclosed = enclosed or {}
        self._on_this_host = ranks.all_gather_object(machine()).count(machine())
        self._writer: CheckpointWriter | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[str, str, int], Tensor] = {}
        self._copying: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        """Events on the device's stream at the copy's begin and end."""
        self._error: BaseException | None = None
        self._started = self._ended = self._blocking_seconds = 0.0
        self._copy_bytes = 0
        self._cleaner: threading.Thread | None = None
        self.problem = ""
        """Why old checkpoints could not be deleted, if they could not."""

    @property
    def step(self) -> int | None:
        """Step of the checkpoint that is being written; None if none is."""
        return None if self._writer is None else self._writer.step

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the checkpoint on its way is written."""
        return self._writer is not None and (self._thread is None or not self._thread.is_alive())

    def start(self, step: int, tensors: Parts, state: Mapping[str, Any], since: float | None = None) -> bool:
        """Begin to write a checkpoint; no other may be on the way. Raises RunFailed as `CheckpointWriter` does.

        Args:
            since: `time.monotonic()` when training stopped for it, if that was before this call.

        Returns whether it is written already, on all ranks, because one of them had no room for a copy.
        """
        assert self._writer is None
        self._started = time.monotonic() if since is None else since
        self.wait_for_deletion()
        writer = CheckpointWriter(self.directory, step, tensors, state, self.ranks, self.enclosed)
        self._copy_bytes, self._error, self._copying = 0, None, None
        copies = self._copied(tensors) if self._has_room(tensors) else None
        if copies is None:
            self._write(writer)
        else:
            writer.tensors, self._copy_bytes = copies, num_bytes(tensors)
            self._write_in_background(writer)
        self._writer = writer
        self._blocking_seconds = time.monotonic() - self._started
        return copies is None

    def finish(self) -> Saved:
        """Wait for it. Raises RunFailed, on all ranks, if it could not be written."""
        assert self._writer is not None
        began = time.monotonic()
        self.join()
        self._writer = self._thread = None
        if self._error is not None:
            raise self._error
        blocking_seconds = self._blocking_seconds
        if self._copying is not None:
            begin, end = self._copying
            blocking_seconds = max(blocking_seconds, begin.elapsed_time(end) / 1000)
        blocking_seconds += time.monotonic() - began
        return Saved(self._ended - self._started, blocking_seconds, self._copy_bytes)

    def join(self) -> None:
        """Wait for the thread, whether its work succeeds or fails."""
        if self._thread is not None:
            self._thread.join()

    def delete_old(self, keep_last: int, best_step: int | None) -> None:
        """Delete old checkpoints as `checkpoint.prune` does, by a thread."""

        def prune() -> None:
            try:
                checkpoint.prune(self.directory, keep_last, best_step)
            except RunFailed as error:
                self.problem = str(error)

        self.wait_for_deletion()
        if self.ranks.is_first:
            self._cleaner = threading.Thread(target=prune, name="cleaner")
            self._cleaner.start()

    def wait_for_deletion(self) -> None:
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None

    def _write_in_background(self, writer: CheckpointWriter) -> None:
        self._thread = threading.Thread(target=self._write, args=(writer,), name="saver", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives this process no further thread
            self._thread = None
            self._write(writer)

    def _write(self, writer: CheckpointWriter) -> None:
        try:
            with nullcontext() if self._copying is None else torch.cuda.stream(torch.cuda.Stream(self.device)):
                if self._copying is not None:  # a stream of its own, so that the next steps need not wait
                    torch.cuda.current_stream().wait_event(self._copying[1])
                writer.write()
            writer.publish()
        except BaseException as error:  # `finish` raises it in the thread that trains
            self._error = error
        self._ended = time.monotonic()

    def _has_room(self, tensors: Parts) -> bool:
        """Whether every rank has room for a copy and for the next step."""
        missing: Counter[str] = Counter()
        for key, source in _sources(tensors).items():
            if not self._fits(key, source):
                missing[source.device.type] += source.nbytes
        has = all(self._free_bytes(kind) >= count + SPARE_BYTES for kind, count in missing.items())
        return self._all_ranks(has)

    def _free_bytes(self, kind: str) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if kind == "cuda" else free_host_bytes(self._on_this_host)

    def _all_ranks(self, mine: bool) -> bool:
        return all(others for (others,) in self.ranks.all_gather([mine]))

    def _fits(self, key: tuple[str, str, int], source: Tensor) -> bool:
        """Whether the last checkpoint's copy of this tensor can be overwritten."""
        copy = self._copies.get(key)
        return copy is not None and (copy.shape, copy.dtype) == (source.shape, source.dtype)

    def _copied(self, tensors: Parts) -> dict[str, dict[str, Saveable]] | None:
        """The tensors, copied on their device; None if a rank had less memory than it seemed."""
        has_copy = True
        try:
            begun = self._event()
            for key, source in _sources(tensors).items():
                if not self._fits(key, source):
                    self._copies[key] = torch.empty_like(source, memory_format=torch.contiguous_format)
                self._copies[key].copy_(source)
            ended = self._event()
            self._copying = None if begun is None or ended is None else (begun, ended)
        except (MemoryError, RuntimeError):  # PyTorch's own is one; whatever else it is, writing meets it again
            has_copy = False
        if not self._all_ranks(has_copy):
            self._copies, self._copying = {}, None
            return None
        return {
            part: {
                name: with_tensors(value, tuple(self._copies[part, name, i] for i in range(len(tensors_of(value)))))
                for name, value in values.items()
            }
            for part, values in tensors.items()
        }

    def _event(self) -> torch.cuda.Event | None:
        """An event at the current place of the device's stream; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _sources(tensors: Parts) -> dict[tuple[str, str, int], Tensor]:
    """All tensors by part, name and number."""
    return {
        (part, name, number): tensor.detach()
        for part, values in tensors.items()
        for name, value in values.items()
        for number, tensor in enumerate(tensors_of(value))
    }
