"""Documents: shards of text, shuffled reproducibly, at a position that can be saved and found again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from p828.config import DataConfig
from p828.data.files import file_shards, python_shards
from p828.data.hub import hub_shards
from p828.data.retry import NO_RETRY, Retry
from p828.data.shard import Shard, deal
from p828.errors import UserError

HELD_OUT_ORDER = (0,)  # held-out documents come in one shard order, whatever the run's seed


class DocumentStream:
    """Iterator of documents (`str`, never empty).

    Each epoch visits the shards in an order drawn from (seed, epoch). `block_documents` documents at a
    time are read, across shards, and given in an order drawn from (seed, epoch, number of the block): the
    state is where the block starts and how much of it was given, and no buffer need be stored.

    Args:
        shards: the pieces, in their unshuffled order.
        source: what the documents come from, in words, for messages.
        block_documents: documents read and shuffled together.
        seed: of the order; None gives every shard and document in the order they have.
        epochs: passes over the shards; None never ends.
        share: share of the documents, by hash, that is held out.
        held_out: give the held-out documents, instead of the others.
        retry: what is done about failed reads.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        source: str,
        block_documents: int,
        seed: int | None = None,
        epochs: int | None = None,
        share: float = 0.0,
        held_out: bool = False,
        retry: Retry = NO_RETRY,
    ) -> None:
        self.shards = shards
        self.source = source
        self.block_documents = block_documents
        self.seed = seed
        self.epochs = epochs
        self.share = share
        self.held_out = held_out
        self.retry = retry
        self.bad_records = 0
        self._sizes = [max(shard.size, 1) for shard in shards]
        self._bytes_read = 0, 0  # shards of the epoch that are read, and their size
        self._orders: dict[int, list[int]] = {}  # of the shards, by epoch: the current one's
        # The current block: which one, where in the epoch's shards it starts, and how much of it was given.
        self._epoch = 0
        self._block = 0
        self._start = (0, 0)  # place of the shard in the epoch's order, documents of it before the block
        self._given = 0
        # What reading the block gave; all of it follows from the four above.
        self._documents: list[str] | None = None
        self._end = (0, 0)
        self._reader: Iterator[str] | None = None  # at `_end`
        identity = [[(shard.name, shard.size) for shard in shards], block_documents, seed, share, held_out]
        self._fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()

    @property
    def epoch(self) -> int:
        """Epoch, from 0, of the document given last (of the first document, before any)."""
        return self._epoch

    def share_read(self) -> float:
        """About how much of the epoch has been read, from 0 to 1: by bytes, else by shards."""
        place, _ = self._end
        order = self._order()
        if self._bytes_read[0] > place:
            self._bytes_read = 0, 0
        counted, size = self._bytes_read
        size += sum(self._sizes[i] for i in order[counted:place])
        self._bytes_read = place, size
        begun = self._sizes[order[place]] * self.shards[order[place]].share_read() if place < len(order) else 0
        return (size + begun) / sum(self._sizes)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Raises UserError if a whole epoch holds no document or a file or row is wrong, and ReadFailed."""
        while self.epochs is None or self._epoch < self.epochs:
            if self._documents is None:
                self._read_block()
            documents = self._documents
            assert documents is not None
            if self._given < len(documents):
                self._given += 1
                return documents[self._given - 1]
            if documents:
                self._begin_block(self._epoch, self._block + 1, self._end)
            elif self._block == 0:
                remedy = "\nRaise data.validation.share, or give data.validation.files" if self.held_out else ""
                raise UserError(f"no documents in {self.source}{remedy}")
            else:
                self._begin_block(self._epoch + 1, 0, (0, 0))
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        shard, record = self._start
        return {
            "epoch": self._epoch,
            "block": self._block,
            "shard": shard,
            "record": record,
            "given": self._given,
            "source": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the document after the one given last before `state_dict`.

        Raises UserError if the shards, their order's seed or the blocks are not those of the state.
        """
        if state["source"] != self._fingerprint:
            raise UserError(
                f"{self.source}: not the data of the checkpoint: its files or shards, data.block_documents or "
                "data.validation or train.seed changed. Restore them, or start a new run"
            )
        self._begin_block(state["epoch"], state["block"], (state["shard"], state["record"]))
        self._given = state["given"]
        self._reader = None

    def _begin_block(self, epoch: int, block: int, start: tuple[int, int]) -> None:
        self._epoch, self._block, self._start, self._given = epoch, block, start, 0
        self._documents = None

    def _read_block(self) -> None:
        place, record = self._start
        order = self._order()
        documents: list[str] = []
        while place < len(order) and len(documents) < self.block_documents:
            if self._reader is None:
                self._reader = self.retry.documents(self.shards[order[place]], record)
            for text in self._reader:
                record += 1
                if text and is_held_out(text, self.share) == self.held_out:
                    documents.append(text)
                    if len(documents) == self.block_documents:
                        break
            else:
                place, record, self._reader = place + 1, 0, None
        self._documents = [documents[i] for i in self._permutation(len(documents), self._epoch, self._block + 1)]
        self._end = (place, record)

    def _order(self) -> list[int]:
        """The shards in the order of the current epoch."""
        if self._epoch not in self._orders:
            self._orders = {self._epoch: self._permutation(len(self.shards), self._epoch, 0)}
        return self._orders[self._epoch]

    def _permutation(self, length: int, *key: int) -> list[int]:
        return list(range(length)) if self.seed is None else permutation(length, (self.seed, *key))


def permutation(length: int, key: tuple[int, ...]) -> list[int]:
    """A permutation of range(length) drawn from the key, the same with every version of numpy.

    numpy promises unchanging streams for its bit generators only, not for `Generator.permutation`.
    """
    order: list[int] = np.argsort(np.random.PCG64(key).random_raw(length), kind="stable").tolist()
    return order


def open_training(
    config: DataConfig, seed: int, epochs: int | None = None, part: int = 0, parts: int = 1, retry: Retry = NO_RETRY
) -> DocumentStream:
    """The training documents, shuffled; without the held-out share if validation takes one.

    Of `parts` streams, which have no document in common, it is the one numbered `part`. Raises UserError if the source
    cannot be opened; `epochs=None` never ends.
    """
    shards, source = _training_shards(config)
    share = config.validation.share if config.validation.kind == "held_out" else 0.0
    shards = deal(shards, part, parts)
    if parts > 1:
        source = f"part {part + 1} of data.streams = {parts} of {source}"
    return DocumentStream(shards, source, config.block_documents, seed, epochs, share, retry=retry)


def open_in_order(config: DataConfig, retry: Retry = NO_RETRY) -> DocumentStream:
    """Every document of the source once, held out or not, as they come. Raises UserError as `open_training`."""
    shards, source = _training_shards(config)
    return DocumentStream(shards, source, block_documents=1, epochs=1, retry=retry)


def open_validation(config: DataConfig, retry: Retry = NO_RETRY) -> DocumentStream:
    """The validation documents, once, in an order that no seed changes. Raises UserError as `open_training`."""
    validation = config.validation
    # Blocks of one document: evaluation reads no further than it needs.
    if validation.kind == "files":
        files = file_shards(validation.files, config.text_field, "data.validation.files")
        return DocumentStream(
            files, f"data.validation.files = {list(validation.files)}", block_documents=1, epochs=1, retry=retry
        )
    if validation.kind == "split":
        name = validation.hub_name or config.hub_name
        subset = config.hub_subset if name == config.hub_name else ""
        shards = hub_shards(name, subset, validation.split, config.text_field)
        return DocumentStream(shards, f"split {validation.split!r} of {name}", block_documents=1, epochs=1, retry=retry)
    in_order, source = _training_shards(config)
    # Spread over the source: evaluation may read the first documents only.
    spread = [in_order[i] for i in permutation(len(in_order), HELD_OUT_ORDER)]
    source = f"the held-out share data.validation.share = {validation.share} of {source}"
    return DocumentStream(
        spread, source, block_documents=1, epochs=1, share=validation.share, held_out=True, retry=retry
    )


def is_held_out(text: str, share: float) -> bool:
    """Whether a hash of the text, as a fraction of its range, is below the share: the same in every run."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _training_shards(config: DataConfig) -> tuple[Sequence[Shard], str]:
    if config.source == "python":
        return python_shards(), "the standard library's source"
    if config.source == "files":
        return file_shards(config.files, config.text_field, "data.files"), f"data.files = {list(config.files)}"
    shards = hub_shards(config.hub_name, config.hub_subset, config.hub_split, config.text_field)
    return shards, f"split {config.hub_split!r} of {config.hub_name}"
