"""Prepared data: token ids in memory-mapped shards, and rows of them in an order that is computed.

A prepared directory holds `manifest.json`, `tokenizer.json` and, for the parts `training` and `validation`, shards of
two files each: `NAME.tokens` (token ids, every document followed by EOS) and `NAME.documents` (uint64: twice the place
in the shard where each document ends, plus one if it is a piece of a cut document). Integers are little-endian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from p828.data.manifest import DOCUMENTS, TOKENS, Manifest, ShardEntry, check_shards, check_tokenizer, open_manifest
from p828.data.permutation import Permutation
from p828.data.row import Row
from p828.data.tokenizer import Tokenizer
from p828.errors import UserError

VALIDATION_ORDER = (0,)  # the key of an order that no seed changes
DOCUMENT_ENDS = np.dtype("<u8")
NUMBERS_AT_ONCE = 1024  # of rows: computing so many takes little more time than one


class Tokens:
    """The tokens of a part, its shards end to end, with the number of the document that each belongs to."""

    def __init__(
        self, directory: Path, shards: Sequence[ShardEntry], dtype: np.dtype[Any], eos_id: int, vocab_size: int
    ) -> None:
        self._tokens = [_map(directory / (shard.name + TOKENS), dtype, shard.tokens) for shard in shards]
        self._ends = [_map(directory / (shard.name + DOCUMENTS), DOCUMENT_ENDS, shard.documents) for shard in shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._directory, self._eos_id, self._vocab_size = directory, eos_id, vocab_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, start: int, length: int, epoch: int) -> Row:
        """The `length` tokens from `start` on, padded at the end; documents count from 0 within the row."""
        end = min(start + length, len(self))
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens, ends = [], []
        begins_document = start == self._starts[shard]
        at = start
        while at < end:
            offset = int(self._starts[shard])
            stop = min(end, int(self._starts[shard + 1]))
            tokens.append(self._tokens[shard][at - offset : stop - offset])
            inside = self._ends[shard]
            # Ends are at > start and <= stop; the one before them tells whether a document begins at the start.
            bounds = 2 * np.array([at - offset, stop - offset], np.uint64) + np.uint64(1)
            low, high = np.searchsorted(inside, bounds, side="right")
            if at == start and low > 0:
                begins_document |= int(inside[low - 1]) // 2 == at - offset
            ends.append(inside[low:high].astype(np.int64) + 2 * (offset - start))
            shard, at = shard + 1, stop
        return self._row(np.concatenate(tokens).astype(np.int64), np.concatenate(ends), begins_document, epoch).padded(
            length, self._eos_id
        )

    def cut_documents(self, row_length: int) -> int:
        """How many documents have parts in several rows."""
        cut = 0
        for tokens, marks, offset in zip(self._tokens, self._ends, self._starts, strict=False):
            ends, is_piece = (marks // 2).astype(np.int64), marks % 2 == 1
            is_last = np.ones_like(is_piece)
            is_last[is_piece] = tokens[ends[is_piece] - 1] == self._eos_id
            starts = np.concatenate([[0], ends[:-1]])
            crosses = (starts + offset) // row_length != (ends - 1 + offset) // row_length
            cut += int((is_last & (is_piece | crosses)).sum())
        return cut

    def _row(self, tokens: Any, marks: Any, begins_document: bool, epoch: int) -> Row:
        """A row of documents with these marks: twice the place of their end in it, plus one if they are pieces."""
        ends, is_piece = marks // 2, marks % 2 == 1
        if (np.diff(ends, prepend=0) < 1).any() or (ends > len(tokens)).any() or (tokens >= self._vocab_size).any():
            raise UserError(f"{self._directory}: no prepared data: documents end nowhere, or ids are no tokens")
        steps = np.zeros(len(tokens) + 1, dtype=np.int32)
        steps[ends] = 1
        is_last = tokens[ends - 1] == self._eos_id
        if len(ends) and not begins_document:
            is_piece[0] = True
        document_ids = np.cumsum(steps[:-1], dtype=np.int32)
        return Row(tokens, document_ids, epoch, int(is_last.sum()), int((is_last & is_piece).sum()))


def _map(path: Path, dtype: np.dtype[Any], length: int) -> Any:
    """Raises UserError if the file has another length."""
    try:
        size = path.stat().st_size
        if size != length * dtype.itemsize:
            raise UserError(f"{path}: damaged or changed: {size:,} bytes, not {length * dtype.itemsize:,}")
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Prepared:
    """An opened directory of prepared data."""

    directory: Path
    manifest: Manifest
    eos_id: int
    vocab_size: int

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer) -> "Prepared":
        """Raises UserError if it is none, or was prepared with another tokenizer. Shards are not read yet."""
        manifest = open_manifest(directory)
        check_tokenizer(manifest, tokenizer, directory)
        return cls(directory, manifest, tokenizer.eos_id, tokenizer.vocab_size)

    def tokens(self, part: Literal["training", "validation"]) -> Tokens:
        """Raises UserError naming a file that is not there or not of its size."""
        shards = self.manifest.training if part == "training" else self.manifest.validation
        return Tokens(self.directory, shards, self.manifest.token_dtype, self.eos_id, self.vocab_size)

    def validation_rows(self, count: int, sequence_length: int) -> list[Row]:
        """Up to `count` rows from all over the validation documents, the same ones whatever the seed.

        Raises UserError naming a damaged shard.
        """
        tokens = self.tokens("validation")
        check_shards(self.directory, self.manifest.validation)
        length = sequence_length + 1
        # A last row of a single token has nothing to predict.
        order = Permutation(max(-(-(len(tokens) - 1) // length), 1), VALIDATION_ORDER)
        numbers = order(range(min(count, order.length)))
        return [tokens.row(int(number) * length, length, epoch=0) for number in numbers]


class PreparedRows:
    """Training rows in random order: what stands at a place of an epoch is a function of (seed, epoch, place) alone.

    Row r is the tokens from r (S+1) on; the last one is padded. The state is how many rows were given to all ranks, so
    that any number of them goes on at once from any place.
    """

    def __init__(self, prepared: Prepared, sequence_length: int, seed: int) -> None:
        self.prepared = prepared
        self.tokens = prepared.tokens("training")
        self.fingerprint = prepared.manifest.fingerprint()
        self.row_length = sequence_length + 1
        self.seed = seed
        self._given = 0
        self._numbers: tuple[tuple[int, int], Any] = ((-1, -1), None)  # a block of the order, by epoch and number
        self._known: dict[str, list[int]] = {}  # files as they were when their checksums were last seen to be right
        self._checked: dict[str, list[int]] = {}  # the same, for this process

    @property
    def rows_per_epoch(self) -> int:
        return -(-len(self.tokens) // self.row_length)

    def take(self, batch: int, count: int) -> list[Row]:
        """The next `count` rows. Raises UserError, before the first, if a shard is damaged."""
        if not self._checked:
            self._checked = check_shards(self.prepared.directory, self.prepared.manifest.training, self._known)
        self._given += count
        return [self.at(index) for index in range(self._given - count, self._given)]

    def skip(self, batch: int, count: int) -> None:
        self._given += count

    def at(self, index: int) -> Row:
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
        return {"prepared": self.fingerprint, "rows": self._given, "checked": self._checked or self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state is of other data."""
        if state.get("prepared") != self.fingerprint:
            raise UserError(
                f"{self.prepared.directory}: not the data of the checkpoint. Give that as data.prepared, or start a "
                "new run"
            )
        self._given, self._known, self._checked = state["rows"], state["checked"], {}
