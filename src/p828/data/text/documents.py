"""Documents: shards of text, shuffled reproducibly, at a position that can be saved and found again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from p828.data.retry import NO_RETRY, Retry
from p828.data.text.identities import Identities
from p828.data.text.shard import BadRecord, EveryNth, Shard, record_of
from p828.errors import ConfigError, DataError, TransientReadError

BLOCK_CHARACTERS = 2**28  # after which a block ends, however few documents it has


class DocumentStream:
    """Iterator of documents (`str`, never empty).

    Each epoch visits the shards in an order drawn from (seed, epoch). `block_documents` documents at a
    time are read, across shards, and put in an order drawn from (seed, epoch, number of the block). The state is where
    the block starts and how many of its documents were consumed: no buffer need be stored.

    Args:
        shards: the pieces, in their unshuffled order.
        source: what the documents come from, in words, for messages.
        block_documents: documents read and shuffled together.
        seed: of the order; with None, shards and documents keep the order they have.
        epochs: passes over the shards; None never ends.
        fraction: of the text that is held out.
        held_out: return what is held out, instead of the rest.
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
        fraction: float = 0.0,
        held_out: bool = False,
        by_end: bool = False,
        retry: Retry = NO_RETRY,
    ) -> None:
        self.shards = shards
        self.source = source
        self.block_documents = block_documents
        self.seed = seed
        self.epochs = epochs
        self.fraction = fraction
        self.held_out = held_out
        self.by_end = by_end
        self.retry = retry
        self.bad_records = 0
        """Records that were skipped so far in the first epoch."""
        self.stopped: list[dict[str, Any]] = []
        """The bad records at which reading ended. A state carries them, too, so that a mended one is accepted."""
        self._bytes_read = 0, 0  # how many of the epoch's shards were read, and their bytes
        self._orders: dict[int, list[int]] = {}  # of the shards, by epoch: the current one's
        self._block_characters: float = BLOCK_CHARACTERS
        # The current block: which one, where in the epoch's shards it starts, and how much of it was consumed.
        self._epoch = 0
        self._block = 0
        self._start = (0, 0)  # place of the shard in the epoch's order, documents of it before the block
        self._consumed = 0
        self._bad_before = 0  # bad records before the block
        # What reading the block gave; all of it follows from those above.
        self._documents: list[str] | None = None
        self._places: list[tuple[int, int]] = []  # of each document: number of its shard, and its own in there
        self._end = (0, 0)
        self._reader: Iterator[str | BadRecord] | None = None  # at `_end`

    @property
    def epoch(self) -> int:
        """Epoch, from 0, of the document returned last; before any, of the first document."""
        return self._epoch

    def place(self) -> tuple[str, int]:
        """The shard's name and the number of the record that hold the document returned last."""
        shard, record = self._places[self._consumed - 1]
        return record_of(self.shards[shard], record)

    def fraction_read(self) -> float:
        """About how much of the epoch has been read, from 0 to 1: by bytes, else by shards."""
        place, _ = self._end
        order = self._order()
        if self._bytes_read[0] > place:
            self._bytes_read = 0, 0
        counted, size = self._bytes_read
        size += sum(self._sizes[i] for i in order[counted:place])
        self._bytes_read = place, size
        begun = self._sizes[order[place]] * self.shards[order[place]].fraction_read() if place < len(order) else 0
        return (size + begun) / sum(self._sizes)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Raises DataError if a whole epoch holds no document or a file or row is wrong, and TransientReadError."""
        while self.epochs is None or self._epoch < self.epochs:
            if self._documents is None:
                self._read_block()
            documents = self._documents
            assert documents is not None
            if self._consumed > len(documents):
                raise DataError(f"{self.source}: fewer documents than were given before the checkpoint: it changed")
            if self._consumed < len(documents):
                self._consumed += 1
                return documents[self._consumed - 1]
            if documents:
                self._begin_block(self._epoch, self._block + 1, self._end)
            elif self._block == 0:
                raise DataError(self._emptiness())
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
            "given": self._consumed,
            "bad_records": self._bad_before,
            "order": self._order_fingerprint,
            "shards": self._identities.text,
        }
        return {**state, "by_end": True} if self.by_end else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the document after the one returned last before `state_dict`.

        The shards may have moved, and one that is in `stopped` may have changed from its bad record on. Raises
        ConfigError naming a shard that is another, or if the order's seed, the held-out fraction or the blocks are
        others, and DataError for a state that is none.
        """
        place = [state[key] for key in ("epoch", "block", "shard", "record", "given")]
        bad_records = state.get("bad_records", 0)
        if any(type(number) is not int or number < 0 for number in [*place, bad_records]) or place[2] > len(
            self.shards
        ):
            raise DataError(f"{self.source}: no place in it: {str(place)[:80]}: the checkpoint is damaged")
        difference = self.difference(state)
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
        epoch, block, shard, record, consumed = place
        self._begin_block(epoch, block, (shard, record))
        self._consumed = consumed
        self._reader = None

    def difference(self, state: dict[str, Any]) -> str:
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
        return _fingerprint([self.block_documents, self.seed, self.fraction, self.held_out, parts], 4)

    def _old_fingerprint(self) -> str:
        shards = [(shard.name, shard.size) for shard in self.shards]
        return _fingerprint([shards, self.block_documents, self.seed, self.fraction, self.held_out], 8)

    def _begin_block(self, epoch: int, block: int, start: tuple[int, int]) -> None:
        self._epoch, self._block, self._start, self._consumed = epoch, block, start, 0
        self._bad_before = self.bad_records
        self._documents = None

    def _read_block(self) -> None:
        place, record = self._start
        order = self._order()
        documents: list[str] = []
        places: list[tuple[int, int]] = []
        characters = 0
        self.bad_records = self._bad_before
        while place < len(order) and len(documents) < self.block_documents and characters < self._block_characters:
            if self._reader is None:
                self._reader = read_documents(self.shards[order[place]], record, self.retry)
            try:
                for text in self._reader:
                    record += 1
                    if kept := self._kept(text):
                        documents.append(kept)
                        places.append((order[place], record - 1))
                        characters += len(kept)
                        if len(documents) == self.block_documents or characters >= self._block_characters:
                            break
                else:
                    place, record, self._reader = place + 1, 0, None
            except (DataError, TransientReadError) as error:
                self._reader = None
                if isinstance(error, BadRecord):
                    self.stopped.append(self._identities.stopped(order[place], error.record))
                raise
        if documents and self._block == 0 and place == len(order) and all(map(str.isspace, documents)):
            raise DataError(f"no text in {self.source}: nothing but blank lines and spaces")
        shuffled = self._permutation(len(documents), self._epoch, self._block + 1)
        self._documents = [documents[i] for i in shuffled]
        self._places = [places[i] for i in shuffled]
        self._end = (place, record)

    def _kept(self, text: str | BadRecord) -> str:
        """What this stream returns of a document."""
        if isinstance(text, BadRecord):
            self.bad_records += self._epoch == 0
            return ""
        if not self.fraction:
            return text
        return divided(text, self.fraction, self.by_end)[self.held_out] if text else ""

    def _emptiness(self) -> str:
        """Why an epoch had no document."""
        where = f"no documents in {self.source}"
        if any(isinstance(shard, EveryNth) for shard in self.shards):
            return f"{where}: it has too few of them. Lower data.streams"
        found = (text for shard in self.shards for text in read_documents(shard, 0, self.retry) if text)
        if any(isinstance(text, str) for text in found):
            remedy = "Raise" if self.held_out else "Lower"
            return f"{where}\n{remedy} data.validation.fraction, or give data.validation.files"
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


def read_documents(shard: Shard, start: int, retry: Retry) -> Iterator[str | BadRecord]:
    """A shard's documents from number `start` on; failed reads are repeated. Raises what the shard raises."""
    failures = 0
    while True:
        try:
            for text in shard.documents(start):
                start, failures = start + 1, 0
                yield text
            return
        except TransientReadError as error:
            retry.wait(error, failures)
            failures += 1


def divided(text: str, fraction: float, by_end: bool) -> tuple[str, str]:
    """A document's text for training and the text held out; together they are the document."""
    if by_end:
        cut = _place_to_cut(text, fraction)
        return text[:cut], text[cut:]
    return ("", text) if is_held_out(text, fraction) else (text, "")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a hash of the text, over its range, is below the fraction: the same in every run."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") < fraction * 2**64


def _place_to_cut(text: str, fraction: float) -> int:
    """Where the held-out end begins: near the fraction, behind a line or a word if there is one near."""
    length = len(text.rstrip())
    exact = max(length - max(round(length * fraction), 1), 1)
    near = min(exact, length - exact) // 4
    for end in ("\n", " "):
        before = text.rfind(end, exact - near, exact)
        after = text.find(end, exact, exact + near) if before < 0 else before
        if after >= 0:
            return after + 1
    return exact
