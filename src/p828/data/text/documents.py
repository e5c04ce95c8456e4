"""Documents: shards of text, shuffled reproducibly, at a position that can be saved and found again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from p828.config import DataConfig
from p828.data.retry import NO_RETRY, Retry
from p828.data.text.files import FileShard, file_shards, python_shards
from p828.data.text.held_out import are_few, divided, enough_documents
from p828.data.text.held_out import is_held_out as is_held_out
from p828.data.text.hub import HubShard, hub_shards
from p828.data.text.identities import Identities
from p828.data.text.shard import BadRecord, EveryNth, Shard, deal
from p828.errors import ConfigError, TransientReadError

HELD_OUT_ORDER = (0,)  # held-out documents come in one shard order, whatever the run's seed
BLOCK_CHARACTERS = 2**28  # that are read and shuffled together at most, in however few documents


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
        share: share of the text that is held out.
        held_out: give what is held out, instead of the rest.
        by_end: the end of each document is held out, not whole documents by a hash.
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
        by_end: bool = False,
        retry: Retry = NO_RETRY,
    ) -> None:
        self.shards = shards
        self.source = source
        self.block_documents = block_documents
        self.seed = seed
        self.epochs = epochs
        self.share = share
        self.held_out = held_out
        self.by_end = by_end
        self.retry = retry
        self.bad_records = 0
        """Passed over in the first epoch so far."""
        self.stopped: list[dict[str, Any]] = []
        """Where reading ended at a bad record: in `stopped` of a state, or here, it lets that go on with it mended."""
        self._bytes_read = 0, 0  # shards of the epoch that are read, and their size
        self._orders: dict[int, list[int]] = {}  # of the shards, by epoch: the current one's
        self._block_characters: float = BLOCK_CHARACTERS
        # The current block: which one, where in the epoch's shards it starts, and how much of it was given.
        self._epoch = 0
        self._block = 0
        self._start = (0, 0)  # place of the shard in the epoch's order, documents of it before the block
        self._given = 0
        self._bad_before = 0  # bad records before the block
        # What reading the block gave; all of it follows from those above.
        self._documents: list[str] | None = None
        self._end = (0, 0)
        self._reader: Iterator[str | BadRecord] | None = None  # at `_end`

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
        """Raises ConfigError if a whole epoch holds no document or a file or row is wrong, and TransientReadError."""
        while self.epochs is None or self._epoch < self.epochs:
            if self._documents is None:
                self._read_block()
            documents = self._documents
            assert documents is not None
            if self._given > len(documents):
                raise ConfigError(f"{self.source}: fewer documents than were given before the checkpoint: it changed")
            if self._given < len(documents):
                self._given += 1
                return documents[self._given - 1]
            if documents:
                self._begin_block(self._epoch, self._block + 1, self._end)
            elif self._block == 0:
                raise ConfigError(self._emptiness())
            else:
                self._begin_block(self._epoch + 1, 0, (0, 0))
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        shard, record = self._start
        state = {
            "epoch": self._epoch,
            "block": self._block,
            "shard": shard,
            "record": record,
            "given": self._given,
            "bad_records": self._bad_before,
            "order": self._order_fingerprint,
            "shards": self._identities.text,
        }
        return {**state, "by_end": True} if self.by_end else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the document after the one given last before `state_dict`.

        The shards may have moved, and one that is in `stopped` may have changed from its bad record on. Raises
        ConfigError naming a shard that is another, or if the order's seed, the held-out share or the blocks are others.
        """
        place = [state[key] for key in ("epoch", "block", "shard", "record", "given")]
        bad_records = state.get("bad_records", 0)
        if any(type(number) is not int or number < 0 for number in [*place, bad_records]) or place[2] > len(
            self.shards
        ):
            raise ConfigError(f"{self.source}: no place in it: {str(place)[:80]}: the checkpoint is damaged")
        difference = self._difference(state)
        if difference:
            raise ConfigError(
                f"{self.source}: not the data of the checkpoint: {difference}. A run goes on with the same files, "
                "wherever they lie, and the same data.block_documents, data.validation and train.seed. Restore them, "
                "or start a new run"
            )
        if "source" in state:
            self._block_characters = float("inf")
        self.by_end = state.get("by_end", False)
        self.bad_records = bad_records
        epoch, block, shard, record, given = place
        self._begin_block(epoch, block, (shard, record))
        self._given = given
        self._reader = None

    def _difference(self, state: dict[str, Any]) -> str:
        """What differs between the state's data and this data, in words; empty if nothing does."""
        settings = "data.block_documents, data.validation or train.seed changed"
        if "source" in state:  # of a version that held out by hash only, and kept one hash of all
            return "" if state["source"] == self._old_fingerprint() else f"its files, shards, {settings}"
        if state["order"] != self._order_fingerprint:
            return settings
        return self._identities.difference(state["shards"], [*self.stopped, *state.get("stopped", [])])

    @cached_property
    def _sizes(self) -> list[int]:
        return [max(shard.size, 1) for shard in self.shards]

    @cached_property
    def _identities(self) -> Identities:
        return Identities(self.shards)

    @cached_property
    def _order_fingerprint(self) -> str:
        parts = [(shard.part, shard.parts) for shard in self.shards if isinstance(shard, EveryNth)]
        return _fingerprint([self.block_documents, self.seed, self.share, self.held_out, parts], 4)

    def _old_fingerprint(self) -> str:
        shards = [(shard.name, shard.size) for shard in self.shards]
        return _fingerprint([shards, self.block_documents, self.seed, self.share, self.held_out], 8)

    def _begin_block(self, epoch: int, block: int, start: tuple[int, int]) -> None:
        self._epoch, self._block, self._start, self._given = epoch, block, start, 0
        self._bad_before = self.bad_records
        self._documents = None

    def _read_block(self) -> None:
        place, record = self._start
        order = self._order()
        documents: list[str] = []
        characters = 0
        self.bad_records = self._bad_before
        while place < len(order) and len(documents) < self.block_documents and characters < self._block_characters:
            if self._reader is None:
                self._reader = self.retry.documents(self.shards[order[place]], record)
            try:
                for text in self._reader:
                    record += 1
                    if kept := self._kept(text):
                        documents.append(kept)
                        characters += len(kept)
                        if len(documents) == self.block_documents or characters >= self._block_characters:
                            break
                else:
                    place, record, self._reader = place + 1, 0, None
            except (ConfigError, TransientReadError) as error:
                self._reader = None
                if isinstance(error, BadRecord):
                    self.stopped.append(self._identities.stopped(order[place], error.record))
                raise
        if documents and self._block == 0 and place == len(order) and all(map(str.isspace, documents)):
            raise ConfigError(f"no text in {self.source}: nothing but blank lines and spaces")
        self._documents = [documents[i] for i in self._permutation(len(documents), self._epoch, self._block + 1)]
        self._end = (place, record)

    def _kept(self, text: str | BadRecord) -> str:
        """The part of a document that this stream gives."""
        if isinstance(text, BadRecord):
            self.bad_records += self._epoch == 0
            return ""
        if not self.share:
            return text
        return divided(text, self.share, self.by_end)[self.held_out] if text else ""

    def _emptiness(self) -> str:
        """Why an epoch had no document."""
        where = f"no documents in {self.source}"
        if any(isinstance(shard, EveryNth) for shard in self.shards):
            return f"{where}: it has too few of them. Lower data.streams"
        found = (text for shard in self.shards for text in self.retry.documents(shard, 0) if text)
        if any(isinstance(text, str) for text in found):
            remedy = "Raise" if self.held_out else "Lower"
            return f"{where}\n{remedy} data.validation.share, or give data.validation.files"
        if self.bad_records:
            return f"{where}: all of it is bad records, {self.bad_records:,} that were passed over"
        return f"{where}: " + ("there is none" if not self.shards else "all of it is empty")

    def _order(self) -> list[int]:
        """The shards in the order of the current epoch."""
        if self._epoch not in self._orders:
            self._orders = {self._epoch: self._permutation(len(self.shards), self._epoch, 0)}
        return self._orders[self._epoch]

    def _permutation(self, length: int, *key: int) -> list[int]:
        return list(range(length)) if self.seed is None else permutation(length, (self.seed, *key))


def _fingerprint(values: Any, size: int) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=size).hexdigest()


def permutation(length: int, key: tuple[int, ...]) -> list[int]:
    """A permutation of range(length) drawn from the key, the same with every version of numpy.

    numpy promises unchanging streams for its bit generators only, not for `Generator.permutation`.
    """
    order: list[int] = np.argsort(np.random.PCG64(key).random_raw(length), kind="stable").tolist()
    return order


def open_training(
    config: DataConfig,
    seed: int,
    epochs: int | None = None,
    part: int = 0,
    parts: int = 1,
    retry: Retry = NO_RETRY,
    by_end: bool | None = None,
) -> DocumentStream:
    """The training documents, shuffled; without the held-out share if validation takes one.

    Of `parts` streams, which have no document in common, it is the one numbered `part`. `by_end` is the rule by which
    text is held out, if that is known already. Raises ConfigError if the source cannot be opened; `epochs=None` never
    ends.
    """
    shards, source = _training_shards(config, retry.tell)
    share = config.validation.share if config.validation.kind == "held_out" else 0.0
    if by_end is None:
        by_end = _is_held_out_by_end(config, shards, retry)
    shards = deal(shards, part, parts)
    if parts > 1:
        source = f"part {part + 1} of data.streams = {parts} of {source}"
    return DocumentStream(shards, source, config.block_documents, seed, epochs, share, by_end=by_end, retry=retry)


def open_in_order(config: DataConfig, retry: Retry = NO_RETRY) -> DocumentStream:
    """Every document of the source once, whole, as they come. Raises ConfigError as `open_training`.

    Its `by_end` says by which rule the caller is to hold out text.
    """
    shards, source = _training_shards(config, retry.tell)
    by_end = _is_held_out_by_end(config, shards, retry)
    return DocumentStream(shards, source, block_documents=1, epochs=1, by_end=by_end, retry=retry)


def open_validation(config: DataConfig, retry: Retry = NO_RETRY, by_end: bool | None = None) -> DocumentStream:
    """The validation documents, once, in an order that no seed changes. Raises ConfigError as `open_training`."""
    validation = config.validation
    # Blocks of one document: evaluation reads no further than it needs.
    if validation.kind == "files":
        files = file_shards(
            validation.files,
            config.text_field,
            "data.validation.files",
            config.max_document_megabytes * 10**6,
            config.bad_records == "skip",
            retry.tell,
        )
        return DocumentStream(
            files, f"data.validation.files = {_shown(validation.files)}", block_documents=1, epochs=1, retry=retry
        )
    if validation.kind == "split":
        name = validation.hub_name or config.hub_name
        subset = config.hub_subset if name == config.hub_name else ""
        revision = validation.hub_revision or (config.hub_revision if name == config.hub_name else "")
        shards = _hub_shards(config, name, subset, validation.split, revision)
        return DocumentStream(shards, f"split {validation.split!r} of {name}", block_documents=1, epochs=1, retry=retry)
    in_order, source = _training_shards(config, retry.tell)
    if by_end is None:
        by_end = _is_held_out_by_end(config, in_order, retry)
    # Spread over the source: evaluation may read the first documents only.
    spread = [in_order[i] for i in permutation(len(in_order), HELD_OUT_ORDER)]
    source = f"the held-out share data.validation.share = {validation.share} of {source}"
    return DocumentStream(
        spread, source, block_documents=1, epochs=1, share=validation.share, held_out=True, by_end=by_end, retry=retry
    )


def held_out_words(config: DataConfig, by_end: bool | None = None) -> str:
    """What is never trained on, in a line; empty where validation has text of its own.

    Raises ConfigError as `open_training`.
    """
    if config.validation.kind != "held_out":
        return ""
    source = " ".join(config.files) if config.source == "files" and len(config.files) <= 3 else _words(config)
    if by_end is None:
        by_end = _may_be_few(config) and _is_held_out_by_end(config, _training_shards(config)[0], NO_RETRY)
    share = f"{100 * config.validation.share:.3g}%"
    if not by_end:
        return f"held out for validation: {share} of the documents in {source}"
    few = f"it has fewer than {enough_documents(config.validation.share):,} documents, or the same few again and again"
    return f"held out for validation: the last {share} of each document in {source}, as {few}"


def _training_shards(
    config: DataConfig, tell: Callable[[str], None] = lambda text: None
) -> tuple[Sequence[Shard], str]:
    if config.source == "python":
        return python_shards(), _words(config)
    if config.source == "files":
        limit = config.max_document_megabytes * 10**6
        files = file_shards(config.files, config.text_field, "data.files", limit, config.bad_records == "skip", tell)
        return files, _words(config)
    shards = _hub_shards(config, config.hub_name, config.hub_subset, config.hub_split, config.hub_revision)
    return shards, _words(config)


def _words(config: DataConfig) -> str:
    """Where the training documents come from, in words."""
    if config.source == "python":
        return "the standard library's source"
    if config.source == "files":
        return f"data.files = {_shown(config.files)}"
    return f"split {config.hub_split!r} of {config.hub_name}"


def _hub_shards(config: DataConfig, name: str, subset: str, split: str, revision: str) -> list[HubShard]:
    limit = config.max_document_megabytes * 10**6
    return hub_shards(name, subset, split, config.text_field, revision, limit, config.bad_records == "skip")


def _is_held_out_by_end(config: DataConfig, shards: Sequence[Shard], retry: Retry) -> bool:
    """Whether there are too few documents to hold out whole ones."""
    if not _may_be_few(config):
        return False
    local = [shard for shard in shards if isinstance(shard, FileShard | HubShard)]
    return are_few(local, config.validation.share, retry)


def _may_be_few(config: DataConfig) -> bool:
    """The standard library is known not to be; what has to come over the network is not counted."""
    is_local = config.source == "files" or (config.source == "hf" and os.path.isdir(config.hub_name))
    return config.validation.kind == "held_out" and is_local


def _shown(globs: Sequence[str]) -> str:
    text = str(list(globs))
    return text if len(text) <= 200 else text[:200] + "…"
