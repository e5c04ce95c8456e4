"""Rows to batches of tensors, made ahead in a background thread."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from p828.config import Config
from p828.data.packing import Packer, Row
from p828.data.shuffle import RowShuffler
from p828.data.source import open_training, open_validation
from p828.data.tokenizer import Tokenizer
from p828.errors import UserError

NO_TARGET = -100
PADDING = -1
PREFETCHED_BATCHES = 8


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

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

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
        return Batch(
            change(self.tokens_BS),
            change(self.targets_BS),
            change(self.positions_BS),
            change(self.document_ids_BS),
            self.num_targets,
        )


def make_batch(rows: Sequence[Row], mask_documents: bool, padding: int = 0) -> Batch:
    """Stack rows of equal length; the last `padding` tokens of the last row are padding."""
    tokens = np.stack([row.tokens for row in rows])
    document_ids_BS = np.stack([row.document_ids[:-1] for row in rows])
    targets_BS = tokens[:, 1:].copy()
    if padding:
        targets_BS[-1, -padding:] = NO_TARGET
        # The last token of the text has no target, and so is padding as an input.
        document_ids_BS[-1, -padding:] = PADDING
    index = np.arange(targets_BS.shape[1])
    positions_BS = np.broadcast_to(index, targets_BS.shape)
    if mask_documents:
        begins = np.diff(document_ids_BS, axis=1, prepend=document_ids_BS[:, :1]) != 0
        positions_BS = positions_BS - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()),
        torch.from_numpy(targets_BS),
        torch.from_numpy(positions_BS.copy()),
        torch.from_numpy(document_ids_BS),
        num_targets=targets_BS.size - padding,
    )


class Rows(Protocol):
    """A `Packer`, or what stands before one."""

    def __next__(self) -> Row: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loader:
    """Endless iterator of `Batch`es, made by one background thread.

    `state_dict()` belongs to the batch handed out last, whatever has been made ahead. What the thread raises is
    raised by `next`. Close it, or use it in a `with`.
    """

    def __init__(self, rows: Rows, micro_batch_size: int, mask_documents: bool, pin_memory: bool = False) -> None:
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.mask_documents = mask_documents
        self.pin_memory = pin_memory
        self._state = rows.state_dict()
        self._made: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(PREFETCHED_BATCHES)
        self._first: tuple[Batch, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

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
        """Continue after that position. To be called before the first batch. Raises UserError if the data changed."""
        assert self._thread is None, "load_state_dict comes before the first batch"
        self.rows.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """End the thread, after the documents that it is tokenizing."""
        self._stop.set()
        while not self._made.empty():
            self._made.get_nowait()  # room for the batch that the thread may be waiting to put
        if self._thread is not None:
            self._thread.join()

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
        made = self._made.get()
        if isinstance(made, BaseException):
            self._error = made
            raise made
        return made

    def _make(self) -> None:
        try:
            while not self._stop.is_set():
                batch = make_batch([next(self.rows) for _ in range(self.micro_batch_size)], self.mask_documents)
                self._made.put((batch.pin_memory() if self.pin_memory else batch, self.rows.state_dict()))
        except BaseException as error:
            self._made.put(error)


def open_loader(config: Config, tokenizer: Tokenizer, pin_memory: bool = False) -> Loader:
    """The run's training batches from the beginning. Raises UserError if the source cannot be opened."""
    stream = open_training(config.data, config.train.seed)
    packer = Packer(stream, tokenizer, config.data.sequence_length)
    rows = RowShuffler(packer, config.data.shuffle_rows, config.train.seed)
    return Loader(rows, config.train.micro_batch_size, config.model.mask_documents, pin_memory)


def validation_batches(config: Config, tokenizer: Tokenizer, rows: int, micro_batch_size: int) -> list[Batch]:
    """The first `rows` rows of the validation documents, fewer if there are fewer, the last one padded.

    The rows do not depend on `micro_batch_size`; the last batch may have fewer than that.
    Raises UserError if there is no validation text.
    """
    packer = Packer(open_validation(config.data), tokenizer, config.data.sequence_length)
    chosen = [row for row, _ in zip(packer, range(rows), strict=False)]
    padding = 0
    if len(chosen) < rows:
        rest = packer.remainder()
        if rest is not None and len(rest.tokens) > 1:
            padding = config.data.sequence_length + 1 - len(rest.tokens)
            chosen.append(
                Row(
                    np.pad(rest.tokens, (0, padding), constant_values=tokenizer.eos_id),
                    np.pad(rest.document_ids, (0, padding), constant_values=PADDING),
                )
            )
    if not chosen:
        raise UserError(f"no text to validate on in {packer.stream.source}")
    mask = config.model.mask_documents
    batches = []
    for start in range(0, len(chosen), micro_batch_size):
        end = min(start + micro_batch_size, len(chosen))
        batches.append(make_batch(chosen[start:end], mask, padding if end == len(chosen) else 0))
    return batches
