"""Saving while training goes on: from a copy that the device makes in a moment, by a thread."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from p828.errors import UserError
from p828.train import checkpoint
from p828.train.checkpoint_writer import CheckpointWriter, num_bytes
from p828.train.fragments import Fragment, values_of
from p828.train.ranks import Ranks

Parts = Mapping[str, Mapping[str, Tensor | Fragment]]
SPARE_BYTES = 2**30  # that a copy must leave free, on its device


class Saved(NamedTuple):
    """How a checkpoint came to be complete."""

    seconds: float
    """From the copy to the end of writing."""
    waited: float
    """Seconds of them that training stood still."""
    copy_bytes: int
    """What the copy takes on this rank; 0 if there was no room for one, and training waited for the disk."""


class BackgroundSaver:
    """Writes one checkpoint at a time. All ranks make the same calls, and have `ranks` for this alone.

    The copies are kept from one checkpoint to the next, so that what they take is known after the first.
    """

    def __init__(self, directory: Path, ranks: Ranks, device: torch.device) -> None:
        self.directory, self.ranks, self.device = directory, ranks, device
        self._writer: CheckpointWriter | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}
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

    def start(self, step: int, tensors: Parts, state: Mapping[str, Any]) -> bool:
        """Begin to write a checkpoint; no other may be on the way. Raises UserError as `CheckpointWriter` does.

        Whether it is written already, on all ranks, as there was no room for a copy on one of them.
        """
        assert self._writer is None
        self._started = time.monotonic()
        self.wait_for_deletion()
        writer = CheckpointWriter(self.directory, step, tensors, state, self.ranks)
        self._copy_bytes, self._error = 0, None
        if self._has_room(tensors):
            writer.tensors, self._copy_bytes = self._copied(tensors), num_bytes(tensors)
            copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
            self._thread = threading.Thread(target=self._write, args=(writer, copied), name="saver", daemon=True)
            self._thread.start()
        else:
            self._write(writer, None)
        self._writer = writer
        self._waited = time.monotonic() - self._started
        return self._thread is None

    def finish(self) -> Saved:
        """Wait for it. Raises UserError, on all ranks, if it could not be written."""
        assert self._writer is not None
        began = time.monotonic()
        self.join()
        self._writer = self._thread = None
        if self._error is not None:
            raise self._error
        return Saved(self._ended - self._started, self._waited + time.monotonic() - began, self._copy_bytes)

    def join(self) -> None:
        """Wait for the thread, whatever comes of its work."""
        if self._thread is not None:
            self._thread.join()

    def delete_old(self, keep_last: int, best_step: int | None) -> None:
        """As `checkpoint.prune`, beside the training."""

        def prune() -> None:
            try:
                checkpoint.prune(self.directory, keep_last, best_step)
            except UserError as error:
                self.problem = str(error)

        self.wait_for_deletion()
        if self.ranks.is_first:
            self._cleaner = threading.Thread(target=prune, name="cleaner")
            self._cleaner.start()

    def wait_for_deletion(self) -> None:
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None

    def _write(self, writer: CheckpointWriter, copied: torch.cuda.Event | None) -> None:
        try:
            with nullcontext() if copied is None else torch.cuda.stream(torch.cuda.Stream(self.device)):
                if copied is not None:  # on a stream of its own it is copied to the host beside the next steps
                    torch.cuda.current_stream().wait_event(copied)
                writer.write()
            writer.publish()
        except BaseException as error:  # for `finish`, in the thread that trains
            self._error = error
        self._ended = time.monotonic()

    def _has_room(self, tensors: Parts) -> bool:
        """Whether every rank has; else the next step might find none for itself."""
        missing: Counter[str] = Counter()
        for part, values in tensors.items():
            for name, value in values.items():
                source = values_of(value).detach()
                if not self._fits((part, name), source):
                    missing[source.device.type] += source.nbytes
        has = all(self._free_bytes(kind) >= count + SPARE_BYTES for kind, count in missing.items())
        return all(others for (others,) in self.ranks.all([has]))

    def _free_bytes(self, kind: str) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if kind == "cuda" else psutil.virtual_memory().available

    def _fits(self, key: tuple[str, str], source: Tensor) -> bool:
        """Whether there is a copy to copy into."""
        copy = self._copies.get(key)
        return copy is not None and (copy.shape, copy.dtype) == (source.shape, source.dtype)

    def _copied(self, tensors: Parts) -> dict[str, dict[str, Tensor | Fragment]]:
        return {
            part: {name: self._copy((part, name), value) for name, value in values.items()}
            for part, values in tensors.items()
        }

    def _copy(self, key: tuple[str, str], value: Tensor | Fragment) -> Tensor | Fragment:
        source = values_of(value).detach()
        if not self._fits(key, source):
            self._copies[key] = torch.empty_like(source, memory_format=torch.contiguous_format)
        copy = self._copies[key].copy_(source)
        return value._replace(values=copy) if isinstance(value, Fragment) else copy
