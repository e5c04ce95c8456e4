"""A rank's training batches: opened as the configuration says, and made ahead in a background thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from p828.config import DataConfig, TrainConfig
from p828.data.batch import HASHES, NO_TARGET, PADDING, Batch, Sample
from p828.data.fingerprints import fingerprints
from p828.data.order import SampleOrder, SampleShuffler, SampleSource, TextStreams, at_step, source_seed
from p828.data.retry import Retry
from p828.data.text.conversation_packing import open_packer, template_of
from p828.data.text.open import check_streams, open_in_order, open_training
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import MANIFEST_FILE
from p828.data.tokens.read import Prepared, ShuffledTokenDataset
from p828.data.tokens.settings import check_settings, data_settings
from p828.errors import TransientReadError

PREFETCHED_BATCHES = 8
LOOK_EVERY = 0.05  # seconds, while a batch is waited for
REPORT_AFTER, REPORT_EVERY = 2.0, 60.0  # seconds
CLOSE_WITHIN = 2.0  # seconds: a thread whose read hangs is left behind


def open_loader(
    data: DataConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    mask_documents: bool,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[str], None] = lambda text: None,
    part: tuple[int, int] = (0, 1),
) -> "Loader":
    """A rank's training batches from the beginning. `report` is given a line when a failed read is repeated.

    Ranks of one host compare prepared files with their checksums together: `part` is this rank's number among them, and
    how many they are. Raises ConfigError if the data cannot be opened.
    """
    cancelled = threading.Event()
    retry = Retry(data.read_retries, cancelled.wait, report)
    order = open_order(data, train, tokenizer, retry, rank, world_size, part)
    return Loader(order, mask_documents, pin_memory, len(data.sources), cancelled, report)


def open_order(
    data: DataConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    retry: Retry,
    rank: int = 0,
    world_size: int = 1,
    part: tuple[int, int] = (0, 1),
) -> SampleOrder:
    """A rank's micro-batches of samples from the beginning. Raises as `open_loader`."""
    sources = [
        _open_source(source, source_seed(train.seed, number), tokenizer, retry, part)
        for number, source in enumerate(data.sources)
    ]
    weights = zip(*(mixed.weights for mixed in data.mixture), strict=True) if data.mixture else [(1.0,)]
    schedule = list(zip(data.mixture_steps, weights, strict=True))
    batches_per_step = train.gradient_accumulation * world_size
    return SampleOrder(sources, schedule, train.micro_batch_size, batches_per_step, rank, world_size)


def _open_source(
    data: DataConfig, seed: int, tokenizer: Tokenizer, retry: Retry, files: tuple[int, int]
) -> SampleSource:
    if data.prepared:
        return ShuffledTokenDataset(open_prepared(data, tokenizer), data.sequence_length, seed, retry, files)
    template = template_of(data, tokenizer)
    by_end = open_in_order(data, retry, template).by_end
    check_streams(data, seed, retry, by_end, template)
    streams, samples = [], []
    for part in range(data.streams):
        own_seed = source_seed(seed, part)
        documents = open_training(data, own_seed, None, part, data.streams, retry, by_end, template)
        packer = open_packer(data, documents, tokenizer)
        streams.append(documents)
        samples.append(SampleShuffler(packer, max(data.shuffle_rows // data.streams, 1), own_seed))
    return TextStreams(samples, streams)


def open_prepared(data: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """Raises ConfigError if it is none, or prepared with another tokenizer, another source or another packing."""
    prepared = Prepared.open(Path(data.prepared), tokenizer)
    check_settings(prepared.manifest.settings, {"data": data_settings(data)}, prepared.directory / MANIFEST_FILE)
    return prepared


def make_batch(samples: Sequence[Sample], mask_documents: bool, sources: int = 1) -> Batch:
    """Stack samples of equal length. `sources` is how many sources the run has."""
    tokens = np.stack([sample.tokens for sample in samples])
    document_ids = np.stack([sample.document_ids for sample in samples])
    has_target = np.stack([sample.targets() for sample in samples])
    targets_BS = np.where(has_target, tokens[:, 1:], NO_TARGET)
    # The last token before padding has nothing to predict, and so is padding as an input.
    document_ids_BS = np.where(document_ids[:, 1:] == PADDING, np.int32(PADDING), document_ids[:, :-1])
    index = np.arange(targets_BS.shape[1])
    positions_BS = np.broadcast_to(index, targets_BS.shape)
    if mask_documents:
        begins = np.diff(document_ids_BS, axis=1, prepend=document_ids_BS[:, :1]) != 0
        positions_BS = positions_BS - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    numbers = [sample.source for sample in samples]
    hashes = [xxhash.xxh3_64_intdigest(sample.tokens.tobytes()) for sample in samples]
    source_tokens = np.bincount(numbers, weights=(document_ids_BS != PADDING).sum(axis=1), minlength=sources)
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()),
        torch.from_numpy(targets_BS),
        torch.from_numpy(positions_BS.copy()),
        torch.from_numpy(document_ids_BS),
        num_targets=int(has_target.sum()),
        source_tokens=tuple(source_tokens.astype(int).tolist()),
        documents=sum(sample.documents for sample in samples),
        split_documents=sum(sample.split_documents for sample in samples),
        hash=sum(hashes) % HASHES,
        row_keys=tuple((hash + sample.epoch) % HASHES for hash, sample in zip(hashes, samples, strict=True)),
        text_bytes=_text_bytes(samples),
        epoch=max(sample.epoch for sample in samples),
        attended_pairs=int((positions_BS + 1).sum(where=document_ids_BS != PADDING)),
        max_token=int(tokens.max()),
        fingerprints=fingerprints(tokens[:, :-1], document_ids_BS != PADDING)[1],
        places=tuple((sample.source, sample.places) for sample in samples),
    )


def _text_bytes(samples: Sequence[Sample]) -> int | None:
    """Of all targets; None if one sample does not say it."""
    counts = [
        int(sample.text_bytes[1:].sum(where=sample.targets())) for sample in samples if sample.text_bytes is not None
    ]
    return sum(counts) if len(counts) == len(samples) else None


class BatchIterator(Protocol):
    """A `SampleOrder`: micro-batches as lists of samples."""

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
        order: BatchIterator,
        mask_documents: bool,
        pin_memory: bool = False,
        sources: int = 1,
        cancelled: threading.Event | None = None,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`cancelled` is set once `next` may wait no longer. `report` is given a line when `next` waits for long."""
        self.order = order
        self.sources = sources
        self.mask_documents = mask_documents
        self.pin_memory = pin_memory
        self._state = order.state_dict()
        self._made: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(PREFETCHED_BATCHES)
        self._first: tuple[Batch, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._stop, self._cancelled = threading.Event(), cancelled or threading.Event()
        self._thread: threading.Thread | None = None
        self._report, self._reported = report, -REPORT_EVERY

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises what reading the data raised; StopIteration once closed or when a finite source fills no batch."""
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
        self.order.load_state_dict(state)
        self._state = state

    def go_on_at(self, step: int) -> None:
        """Make the batches after the one handed out last anew, for the steps of the run after `step`."""
        self._end_thread(within=None)  # which must not read on beside the next one
        self._thread = None
        self._stop.clear()
        self._first = self._error = None
        self._made = queue.Queue(PREFETCHED_BATCHES)
        self._state = at_step(self._state, step)
        self.order.load_state_dict(self._state)

    def cancel(self) -> None:
        """Wait for data no longer: `next` returns a batch that is made, else raises TransientReadError at once."""
        self._cancelled.set()

    def close(self) -> None:
        """End the thread, after the documents that it is tokenizing; one that takes longer, or hangs, is left alone."""
        self._cancelled.set()
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
                if self._cancelled.is_set():
                    raise TransientReadError("data was not waited for, as the run was asked to end") from None
            now = time.monotonic()
            if now - begun > REPORT_AFTER and now - self._reported > REPORT_EVERY:
                self._reported = now
                self._report("waiting for data: the next rows are not read yet")

    def _make(self) -> None:
        try:
            while not self._stop.is_set():
                batch = make_batch(next(self.order), self.mask_documents, self.sources)
                self._made.put((batch.pin_memory() if self.pin_memory else batch, self.order.state_dict()))
        except BaseException as error:
            self._made.put(error)
