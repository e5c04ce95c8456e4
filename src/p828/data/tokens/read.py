"""Prepared data: token ids in shards, and rows of them in an order that is computed.

A prepared directory holds `manifest.json`, `tokenizer.json` and, for the parts `training` and `validation`, shards of
two files each: `NAME.tokens` (token ids, every document followed by EOS) and `NAME.documents` (uint64: twice the place
in the shard where each document ends, plus one if it is a piece of a cut document). Integers are little-endian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from p828.data.retry import NO_RETRY, Retry
from p828.data.sample import Sample
from p828.data.tokenizer import Tokenizer
from p828.data.tokens.format import (
    DOCUMENTS,
    TOKENS,
    Manifest,
    ShardEntry,
    check_shards,
    check_tokenizer,
    open_manifest,
)
from p828.data.tokens.number_files import NumberFiles
from p828.data.tokens.permutation import Permutation
from p828.errors import ConfigError

VALIDATION_ORDER = (0,)  # the key of an order that no seed changes
DOCUMENT_ENDS = np.dtype("<u8")
NUMBERS_AT_ONCE = 1024  # of rows: computing so many takes little more time than one
INDEXED = 512  # the end of every 512th document is in memory; the ends between two of them are read together
COUNTED_TOGETHER = 1 << 16  # documents


class TokenDataset:
    """The tokens of a part, its shards end to end, with the number of the document that each belongs to."""

    def __init__(
        self,
        directory: Path,
        shards: Sequence[ShardEntry],
        dtype: np.dtype[Any],
        eos_id: int,
        vocab_size: int,
        retry: Retry = NO_RETRY,
    ) -> None:
        """Raises ConfigError naming a file that is not there or not of its size."""
        names = [directory / shard.name for shard in shards]
        self._tokens = NumberFiles(
            [name.with_name(name.name + TOKENS) for name in names], dtype, [shard.tokens for shard in shards], retry
        )
        self._ends = NumberFiles(
            [name.with_name(name.name + DOCUMENTS) for name in names],
            DOCUMENT_ENDS,
            [shard.documents for shard in shards],
            retry,
        )
        self._indices: dict[int, Any] = {}  # by shard: every 512th of its ends
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._directory, self._eos_id, self._vocab_size = directory, eos_id, vocab_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, start: int, length: int, epoch: int) -> Sample:
        """The `length` tokens from `start` on, padded at the end; documents count from 0 within the row.

        Raises TransientReadError, and ConfigError if the shards hold no prepared data.
        """
        end = min(start + length, len(self))
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens, ends = [], []
        begins_document = start == self._starts[shard]
        at = start
        while at < end:
            offset = int(self._starts[shard])
            stop = min(end, int(self._starts[shard + 1]))
            tokens.append(self._tokens.read(shard, at - offset, stop - offset))
            before, inside = self._ends_between(shard, at - offset, stop - offset)
            if at == start and before is not None:
                begins_document |= int(before) // 2 == at - offset
            ends.append(inside.astype(np.int64) + 2 * (offset - start))
            shard, at = shard + 1, stop
        return self._row(np.concatenate(tokens).astype(np.int64), np.concatenate(ends), begins_document, epoch).padded(
            length, self._eos_id
        )

    def cut_documents(self, row_length: int) -> int:
        """How many documents have parts in several rows. Raises TransientReadError."""
        cut = 0
        for shard, offset in enumerate(self._starts[:-1]):
            last_end = 0
            for first in range(0, self._ends.lengths[shard], COUNTED_TOGETHER):
                marks = self._ends.read(shard, first, first + COUNTED_TOGETHER)
                ends, is_piece = (marks // 2).astype(np.int64), marks % 2 == 1
                is_last = np.ones_like(is_piece)
                is_last[is_piece] = [
                    (self._tokens.read(shard, end - 1, end) == self._eos_id).all() for end in ends[is_piece].tolist()
                ]
                starts = np.concatenate([[last_end], ends[:-1]])
                crosses = (starts + offset) // row_length != (ends - 1 + offset) // row_length
                cut += int((is_last & (is_piece | crosses)).sum())
                last_end = int(ends[-1])
        return cut

    def _ends_between(self, shard: int, start: int, stop: int) -> tuple[Any, Any]:
        """The marks of the documents that end at > start and <= stop, and the one before them, None if none is."""
        if shard not in self._indices:
            self._indices[shard] = self._index(shard)
        bounds = 2 * np.array([start, stop], np.uint64) + np.uint64(1)
        first, last = np.searchsorted(self._indices[shard], bounds, side="right").tolist()
        marks = self._ends.read(shard, max(first - 1, 0) * INDEXED, last * INDEXED)
        low, high = np.searchsorted(marks, bounds, side="right").tolist()
        return (marks[low - 1] if low else None), marks[low:high]

    def _index(self, shard: int) -> Any:
        numbers = range(0, self._ends.lengths[shard], COUNTED_TOGETHER)
        return np.concatenate([self._ends.read(shard, at, at + COUNTED_TOGETHER)[::INDEXED] for at in numbers])

    def _row(self, tokens: Any, marks: Any, begins_document: bool, epoch: int) -> Sample:
        """A row of documents with these marks: twice the place of their end in it, plus one if they are pieces."""
        ends, is_piece = marks // 2, marks % 2 == 1
        if (np.diff(ends, prepend=0) < 1).any() or (ends > len(tokens)).any() or (tokens >= self._vocab_size).any():
            raise ConfigError(f"{self._directory}: no prepared data: documents end nowhere, or ids are no tokens")
        steps = np.zeros(len(tokens) + 1, dtype=np.int32)
        steps[ends] = 1
        is_last = tokens[ends - 1] == self._eos_id
        if len(ends) and not begins_document:
            is_piece[0] = True
        document_ids = np.cumsum(steps[:-1], dtype=np.int32)
        return Sample(tokens, document_ids, epoch, int(is_last.sum()), int((is_last & is_piece).sum()))


@dataclass(frozen=True)
class Prepared:
    """An opened directory of prepared data."""

    directory: Path
    manifest: Manifest
    eos_id: int
    vocab_size: int

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer) -> "Prepared":
        """Raises ConfigError if it is none, or was prepared with another tokenizer. Shards are not read yet."""
        manifest = open_manifest(directory)
        check_tokenizer(manifest, tokenizer, directory)
        return cls(directory, manifest, tokenizer.eos_id, tokenizer.vocab_size)

    def tokens(self, part: Literal["training", "validation"], retry: Retry = NO_RETRY) -> TokenDataset:
        """Raises ConfigError naming a file that is not there or not of its size."""
        shards = self.manifest.training if part == "training" else self.manifest.validation
        return TokenDataset(self.directory, shards, self.manifest.token_dtype, self.eos_id, self.vocab_size, retry)

    def validation_rows(
        self, count: int, sequence_length: int, retry: Retry = NO_RETRY, part: tuple[int, int] = (0, 1)
    ) -> list[Sample]:
        """Up to `count` rows from all over the validation documents, the same ones whatever the seed.

        `part` is as in `check_shards`. Raises ConfigError naming a damaged shard, and TransientReadError.
        """
        tokens = self.tokens("validation", retry)
        check_shards(self.directory, self.manifest.validation, retry=retry, part=part)
        length = sequence_length + 1
        # A last row of a single token has nothing to predict.
        order = Permutation(max(-(-(len(tokens) - 1) // length), 1), VALIDATION_ORDER)
        numbers = order(range(min(count, order.length)))
        return [tokens.row(int(number) * length, length, epoch=0) for number in numbers]


class ShuffledTokenDataset:
    """Training rows in random order: what stands at a place of an epoch is a function of (seed, epoch, place) alone.

    Sample r is the tokens from r (S+1) on; the last one is padded. The state is how many rows were given to all ranks,
    so that any number of them goes on at once from any place.
    """

    def __init__(
        self,
        prepared: Prepared,
        sequence_length: int,
        seed: int,
        retry: Retry = NO_RETRY,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """`part` is which of the files are compared with their checksums here, as in `check_shards`."""
        self.prepared = prepared
        self.tokens = prepared.tokens("training", retry)
        self.fingerprint = prepared.manifest.fingerprint()
        self.row_length = sequence_length + 1
        self.seed = seed
        self._retry, self._part = retry, part
        self._given = 0
        self._numbers: tuple[tuple[int, int], Any] = ((-1, -1), None)  # a block of the order, by epoch and number
        self._known: dict[str, list[int]] = {}  # files as they were when their checksums were last seen to be right
        self._checked: dict[str, list[int]] | None = None  # the same, for this process

    @property
    def rows_per_epoch(self) -> int:
        return -(-len(self.tokens) // self.row_length)

    def take(self, batch: int, count: int) -> list[Sample]:
        """The next `count` rows. Raises ConfigError, before the first, if a shard is damaged, and TransientReadError."""
        if self._checked is None:
            shards = self.prepared.manifest.training
            self._checked = check_shards(self.prepared.directory, shards, self._known, self._retry, self._part)
        self._given += count
        return [self.at(index) for index in range(self._given - count, self._given)]

    def skip(self, batch: int, count: int) -> None:
        self._given += count

    def at(self, index: int) -> Sample:
        """The row with a number over all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        return self.tokens.row(self._number(epoch, place) * self.row_length, self.row_length, epoch)

    def _number(self, epoch: int, place: int) -> int:
        block, within = divmod(place, NUMBERS_AT_ONCE)
        key = (epoch, block)
        if self._numbers[0] != key:
            places = range(block * NUMBERS_AT_ONCE, min((block + 1) * NUMBERS_AT_ONCE, self.rows_per_epoch))
            self._numbers = key, Permutation(self.rows_per_epoch, (self.seed, epoch))(places)
        return int(self._numbers[1][within])

    def state_dict(self) -> dict[str, Any]:
        """The place, and what is known of the files: of those that are compared here, once they were."""
        checked = self._known if self._checked is None else self._checked
        return {"prepared": self.fingerprint, "rows": self._given, "checked": checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the state is of other data."""
        if state.get("prepared") != self.fingerprint:
            raise ConfigError(
                f"{self.prepared.directory}: not the data of the checkpoint. Give that as data.prepared, or start a "
                "new run"
            )
        self._given, self._known, self._checked = state["rows"], state["checked"], None
