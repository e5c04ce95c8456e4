"""Saving while training goes on: from a copy that the device makes in a moment, by a thread."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError
from p828.runs import checkpoint
from p828.runs.tensors import Saveable, tensors_of, with_tensors
from p828.system.device import machine
from p828.system.host_memory import free_host_bytes
from p828.train.checkpoint_writer import CheckpointWriter, num_bytes

Parts = Mapping[str, Mapping[str, Saveable]]
SPARE_BYTES = 2**30  # that a copy must leave free, on its device


class Saved(NamedTuple):
    """How a checkpoint came to be complete."""

    seconds: float
    """From where training stopped for it to the end of writing."""
    waited: float
    """Seconds of these in which training stood still: the host, or the device for the copy if that took longer."""
    copy_bytes: int
    """What the copy takes on this rank; 0 if there was no room for one, and training waited for the disk."""


class AsyncCheckpointer:
    """Writes one checkpoint at a time. All ranks make the same calls, and have `ranks` for this alone.

    The copies are kept from one checkpoint to the next, so that what they take is known after the first.
    """

    def __init__(
        self, directory: Path, ranks: ProcessGroup, device: torch.device, enclosed: Mapping[str, bytes] | None = None
    ) -> None:
        """`enclosed` are files that every checkpoint is to have, too."""
        self.directory, self.ranks, self.device = directory, ranks, device
        self.enclosed = enclosed or {}
        self._on_this_host = ranks.all_gather_object(machine()).count(machine())
        self._writer: CheckpointWriter | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[str, str, int], Tensor] = {}
        self._copying: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        """Where on the device's stream the copy began and ended."""
        self._error: BaseException | None = None
        self._started = self._ended = self._waited = 0.0
        self._copy_bytes = 0
        self._cleaner: threading.Thread | None = None
        self.problem = ""
        """Why old checkpoints could not be deleted, if they could not."""

    @property
    def step(self) -> int | None:
        """Of the checkpoint that is being written."""
        return None if self._writer is None else self._writer.step

    @property
    def is_written(self) -> bool:
        """Whether this rank has done what is to be done for it."""
        return self._writer is not None and (self._thread is None or not self._thread.is_alive())

    def start(self, step: int, tensors: Parts, state: Mapping[str, Any], since: float | None = None) -> bool:
        """Begin to write a checkpoint; no other may be on the way. Raises ConfigError as `CheckpointWriter` does.

        Args:
            since: `time.monotonic()` when training stopped for it, if that was before this call.

        Whether it is written already, on all ranks, as there was no room for a copy on one of them.
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
            self._write_beside(writer)
        self._writer = writer
        self._waited = time.monotonic() - self._started
        return copies is None

    def finish(self) -> Saved:
        """Wait for it. Raises ConfigError, on all ranks, if it could not be written."""
        assert self._writer is not None
        began = time.monotonic()
        self.join()
        self._writer = self._thread = None
        if self._error is not None:
            raise self._error
        waited = self._waited
        if self._copying is not None:
            begin, end = self._copying
            waited = max(waited, begin.elapsed_time(end) / 1000)
        return Saved(self._ended - self._started, waited + time.monotonic() - began, self._copy_bytes)

    def join(self) -> None:
        """Wait for the thread, whatever comes of its work."""
        if self._thread is not None:
            self._thread.join()

    def delete_old(self, keep_last: int, best_step: int | None) -> None:
        """As `checkpoint.prune`, beside the training."""

        def prune() -> None:
            try:
                checkpoint.prune(self.directory, keep_last, best_step)
            except ConfigError as error:
                self.problem = str(error)

        self.wait_for_deletion()
        if self.ranks.is_first:
            self._cleaner = threading.Thread(target=prune, name="cleaner")
            self._cleaner.start()

    def wait_for_deletion(self) -> None:
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None

    def _write_beside(self, writer: CheckpointWriter) -> None:
        self._thread = threading.Thread(target=self._write, args=(writer,), name="saver", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives this process no thread more
            self._thread = None
            self._write(writer)

    def _write(self, writer: CheckpointWriter) -> None:
        try:
            with nullcontext() if self._copying is None else torch.cuda.stream(torch.cuda.Stream(self.device)):
                if self._copying is not None:  # on a stream of its own it comes to the host beside the next steps
                    torch.cuda.current_stream().wait_event(self._copying[1])
                writer.write()
            writer.publish()
        except BaseException as error:  # for `finish`, in the thread that trains
            self._error = error
        self._ended = time.monotonic()

    def _has_room(self, tensors: Parts) -> bool:
        """Whether every rank has; else the next step might find none for itself."""
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
        """Whether there is a copy to copy into."""
        copy = self._copies.get(key)
        return copy is not None and (copy.shape, copy.dtype) == (source.shape, source.dtype)

    def _copied(self, tensors: Parts) -> dict[str, dict[str, Saveable]] | None:
        """None if there was less memory than it seemed, on some rank."""
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
        """Where the device's stream is now."""
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
