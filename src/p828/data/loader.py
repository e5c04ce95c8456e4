"""Rows to batches of tensors, made ahead in a background thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from p828.data.mixture import at_step
from p828.data.sample import PADDING, Sample
from p828.errors import TransientReadError

NO_TARGET = -100
DIGESTS = 2**32
PREFETCHED_BATCHES = 8
LOOK_EVERY = 0.05  # seconds, while a batch is waited for
TELL_AFTER, TELL_EVERY = 2.0, 60.0  # seconds
CLOSE_WITHIN = 2.0  # seconds: a thread whose read hangs is left behind


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens and what the model is to predict at each."""

    tokens_BS: Tensor
    """int64; EOS where padded."""
    targets_BS: Tensor
    """int64: the next token, of the next document too; -100 where there is none."""
    positions_BS: Tensor
    """int64: from 0 at each document's first token in the row, or 0 … S-1 without document masking."""
    document_ids_BS: Tensor
    """int32: 0, 1, … within the row; -1 where padded."""
    num_targets: int
    """Targets that are not -100, counted on the host."""
    source_targets: tuple[int, ...] = ()
    """The same for each source of the mixture."""
    documents: int = 0
    """Documents that end in the batch."""
    cut_documents: int = 0
    """Those of them that have a part in another row."""
    digest: int = 0
    """Sum of a hash of each row's tokens, modulo 2^32: the same rows have the same, in whatever batches they come."""
    text_bytes: int = 0
    """Bytes of UTF-8 text that the targets stand for, in validation batches."""
    epoch: int = 0
    """The latest epoch that a row belongs to; the first epoch is 0."""
    attended_pairs: int = 0
    """Pairs of a token and one that its attention sees, itself among them; padding left out. L (L + 1) / 2 for each
    document of L tokens in a row, or for each row without document masking."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def without_targets(self) -> "Batch":
        """The same tokens, of which none is to be predicted."""
        return replace(self, targets_BS=torch.full_like(self.targets_BS, NO_TARGET), num_targets=0, text_bytes=0)

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def copy_(self, other: "Batch") -> None:
        """Take over the tensors' contents from a batch of the same shape, without waiting if that is pinned."""
        for own, new in (
            (self.tokens_BS, other.tokens_BS),
            (self.targets_BS, other.targets_BS),
            (self.positions_BS, other.positions_BS),
            (self.document_ids_BS, other.document_ids_BS),
        ):
            own.copy_(new, non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            targets_BS=change(self.targets_BS),
            positions_BS=change(self.positions_BS),
            document_ids_BS=change(self.document_ids_BS),
        )


def make_batch(rows: Sequence[Sample], mask_documents: bool, sources: int = 1) -> Batch:
    """Stack rows of equal length, which come from so many sources."""
    tokens = np.stack([row.tokens for row in rows])
    document_ids = np.stack([row.document_ids for row in rows])
    has_no_target = document_ids[:, 1:] == PADDING
    targets_BS = np.where(has_no_target, NO_TARGET, tokens[:, 1:])
    # The last token of the text has no target, and so is padding as an input.
    document_ids_BS = np.where(has_no_target, np.int32(PADDING), document_ids[:, :-1])
    index = np.arange(targets_BS.shape[1])
    positions_BS = np.broadcast_to(index, targets_BS.shape)
    if mask_documents:
        begins = np.diff(document_ids_BS, axis=1, prepend=document_ids_BS[:, :1]) != 0
        positions_BS = positions_BS - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    targets_of_row = targets_BS.shape[1] - has_no_target.sum(axis=1)
    source_targets = np.bincount([row.source for row in rows], weights=targets_of_row, minlength=sources)
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()),
        torch.from_numpy(targets_BS),
        torch.from_numpy(positions_BS.copy()),
        torch.from_numpy(document_ids_BS),
        num_targets=int(targets_of_row.sum()),
        source_targets=tuple(source_targets.astype(int).tolist()),
        documents=sum(row.documents for row in rows),
        cut_documents=sum(row.cut_documents for row in rows),
        digest=sum(xxhash.xxh3_64_intdigest(row.tokens.tobytes()) for row in rows) % DIGESTS,
        text_bytes=sum(int(row.text_bytes[1:].sum()) for row in rows if row.text_bytes is not None),
        epoch=max(row.epoch for row in rows),
        attended_pairs=int((positions_BS + 1).sum(where=document_ids_BS != PADDING)),
    )


class MicroBatches(Protocol):
    """A `SampleOrder`."""

    def __next__(self) -> list[Sample]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loader:
    """Endless iterator of `Batch`es, made by one background thread.

    `state_dict()` belongs to the batch handed out last, whatever has been made ahead. What the thread raises is
    raised by `next`. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        rows: MicroBatches,
        mask_documents: bool,
        pin_memory: bool = False,
        sources: int = 1,
        cancelled: threading.Event | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`cancelled` is set when nothing is to be waited for any more. `tell` is given a line when data is waited for."""
        self.rows = rows
        self.sources = sources
        self.mask_documents = mask_documents
        self.pin_memory = pin_memory
        self._state = rows.state_dict()
        self._made: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(PREFETCHED_BATCHES)
        self._first: tuple[Batch, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._stop, self._hurry = threading.Event(), cancelled or threading.Event()
        self._thread: threading.Thread | None = None
        self._tell, self._told = tell, -TELL_EVERY

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises what reading the data raised; StopIteration once closed or when a finite stream fills no batch."""
        if self._stop.is_set():
            raise StopIteration
        (batch, self._state), self._first = self._first or self._take(), None
        return batch

    def start(self) -> None:
        """Make the first batch, without handing it out. Raises what reading the data raised."""
        self._first = self._take()

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch handed out last: small, and plain enough for JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that position. To be called before the first batch. Raises ConfigError if the data changed."""
        assert self._thread is None, "load_state_dict comes before the first batch"
        self.rows.load_state_dict(state)
        self._state = state

    def go_on_at(self, step: int) -> None:
        """Give what comes next in the data, made anew, to the steps of the run after `step`."""
        self._end_thread(within=None)  # which must not read on beside the next one
        self._thread = None
        self._stop.clear()
        self._first = self._error = None
        self._made = queue.Queue(PREFETCHED_BATCHES)
        self._state = at_step(self._state, step)
        self.rows.load_state_dict(self._state)

    def cancel(self) -> None:
        """Wait for no data any more: `next` gives what is made, else raises TransientReadError at once."""
        self._hurry.set()

    def close(self) -> None:
        """End the thread, after the documents that it is tokenizing; one that takes longer, or hangs, is left alone."""
        self._hurry.set()
        self._end_thread(CLOSE_WITHIN)

    def _end_thread(self, within: float | None) -> None:
        self._stop.set()
        while not self._made.empty():
            self._made.get_nowait()  # room for the batch that the thread may be waiting to put
        if self._thread is not None:
            self._thread.join(within)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> tuple[Batch, dict[str, Any]]:
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._make, name="p828-loader", daemon=True)
            self._thread.start()
        made = self._wait()
        if isinstance(made, BaseException):
            self._error = made
            raise made
        return made

    def _wait(self) -> tuple[Batch, dict[str, Any]] | BaseException:
        begun = time.monotonic()
        while True:
            try:
                return self._made.get(timeout=LOOK_EVERY)
            except queue.Empty:
                if self._hurry.is_set():
                    raise TransientReadError("data was not waited for, as the run was asked to end") from None
            now = time.monotonic()
            if now - begun > TELL_AFTER and now - self._told > TELL_EVERY:
                self._told = now
                self._tell("waiting for data: the next rows are not read yet")

    def _make(self) -> None:
        try:
            while not self._stop.is_set():
                batch = make_batch(next(self.rows), self.mask_documents, self.sources)
                self._made.put((batch.pin_memory() if self.pin_memory else batch, self.rows.state_dict()))
        except BaseException as error:
            self._made.put(error)
