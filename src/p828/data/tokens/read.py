"""Prepared data: token ids in shards, and samples of them in an order that is computed.

A prepared directory holds `manifest.json`, `tokenizer.json` and, for the parts `training` and `validation`, shards of
two files each: `NAME.tokens` (token ids, every document followed by EOS) and `NAME.documents` (uint64: twice the place
in the shard where each document ends, plus one if it is a piece of a split document). Integers are little-endian.
"""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from p828.data.batch import DocumentPlace, Sample
from p828.data.retry import NO_RETRY, Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import (
    DOCUMENTS,
    TOKENS,
    Manifest,
    ShardEntry,
    check_shards,
    check_tokenizer,
    open_manifest,
)
from p828.data.tokens.permutation import Permutation
from p828.errors import ConfigError, DataError, TransientReadError
from p828.files import open_regular

VALIDATION_ORDER = (0,)  # the key of an order that no seed changes
DOCUMENT_ENDS = np.dtype("<u8")
NUMBERS_AT_ONCE = 1024  # of samples, computed together: that takes little longer than one
INDEXED = 512  # the end of every 512th document is in memory; the ends between two of them are read together
COUNTED_TOGETHER = 1 << 16  # documents
MOST_OPEN = 1024  # files that one `NumberFiles` keeps open at most
SHARE_OPEN = 16  # it also keeps no more open than a 16th of the files that the process may open


class NumberFiles:
    """Files of numbers of one type, read by their place, of which those used last are open.

    They are read and not mapped into memory: the system ends a process whose mapped file is cut or cannot be read.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any], lengths: Sequence[int], retry: Retry) -> None:
        """`lengths` are in numbers. Raises DataError naming a file that is not there or of another size."""
        self.paths, self.dtype, self.lengths, self.retry = paths, dtype, lengths, retry
        self._open: dict[int, BinaryIO] = {}  # the one used last at the end
        self._most_open = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OPEN, MOST_OPEN), 2)
        for path, length in zip(paths, lengths, strict=True):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            if size != length * dtype.itemsize:
                raise DataError(f"{path}: damaged or changed: {size:,} bytes, not {length * dtype.itemsize:,}")

    def read(self, file: int, start: int, stop: int) -> Any:
        """The numbers from `start` to `stop` of a file. Raises TransientReadError, also when the file is shorter by
        now.
        """
        start, stop = max(start, 0), min(stop, self.lengths[file])
        if start >= stop:
            return np.empty(0, self.dtype)
        return np.frombuffer(self.retry.call(lambda: self._bytes(file, start, stop)), self.dtype)

    def __del__(self) -> None:
        for file in self.__dict__.get("_open", {}).values():
            file.close()

    def _bytes(self, file: int, start: int, stop: int) -> bytes:
        at, size = start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        try:
            descriptor = self._opened(file).fileno()
            data = os.pread(descriptor, size, at)
            while len(data) < size:  # more than a call gives, or the end of the file
                more = os.pread(descriptor, size - len(data), at + len(data))
                if not more:
                    now = os.fstat(descriptor).st_size
                    raise TransientReadError(f"{self.paths[file]}: damaged or changed: cut to {now:,} bytes")
                data += more
        except OSError as error:
            if file in self._open:
                self._open.pop(file).close()  # the next attempt opens it anew
            raise TransientReadError(f"{self.paths[file]}: cannot be read: {error.strerror}") from None
        else:
            return data
        finally:
            if len(self._open) > self._most_open:
                self._open.pop(next(iter(self._open))).close()

    def _opened(self, file: int) -> BinaryIO:
        found = self._open.pop(file, None) or open_regular(self.paths[file])
        self._open[file] = found
        return found


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
        """Raises DataError naming a file that is not there or not of its size."""
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
        self._names = [str(name) for name in names]
        self._directory, self._eos_id, self._vocab_size = directory, eos_id, vocab_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, start: int, length: int, epoch: int) -> Sample:
        """The `length` tokens from `start` on, padded at the end; documents count from 0 within the sample.

        Raises TransientReadError, and DataError if the shards hold no prepared data.
        """
        end = min(start + length, len(self))
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens, ends = [], []
        places: list[DocumentPlace] = []
        begins_document = start == self._starts[shard]
        at = start
        while at < end:
            offset = int(self._starts[shard])
            stop = min(end, int(self._starts[shard + 1]))
            tokens.append(self._tokens.read(shard, at - offset, stop - offset))
            before, inside, number = self._ends_between(shard, at - offset, stop - offset)
            if at == start and before is not None:
                begins_document |= int(before) // 2 == at - offset
            ends.append(inside.astype(np.int64) + 2 * (offset - start))
            ended_before = 0 if before is None else int(before) // 2
            num_documents = len(inside) + int(not len(inside) or int(inside[-1]) // 2 < stop - offset)
            places += [
                DocumentPlace(self._names[shard], number + i, 0 if i else at - offset - ended_before)
                for i in range(num_documents)
            ]
            shard, at = shard + 1, stop
        found = np.concatenate(tokens).astype(np.int64)
        sample = self._sample(found, np.concatenate(ends), begins_document, epoch)
        return replace(sample, places=tuple(places)).padded(length, self._eos_id)

    def split_documents(self, sample_length: int) -> int:
        """How many documents are in several samples. Raises TransientReadError."""
        split = 0
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
                crosses = (starts + offset) // sample_length != (ends - 1 + offset) // sample_length
                split += int((is_last & (is_piece | crosses)).sum())
                last_end = int(ends[-1])
        return split

    def _ends_between(self, shard: int, start: int, stop: int) -> tuple[Any, Any, int]:
        """The mark before those of the documents that end at > start and <= stop, None if none is; these; and the
        number in the shard of the first of these documents.
        """
        if shard not in self._indices:
            self._indices[shard] = self._index(shard)
        bounds = 2 * np.array([start, stop], np.uint64) + np.uint64(1)
        first, last = np.searchsorted(self._indices[shard], bounds, side="right").tolist()
        marks = self._ends.read(shard, max(first - 1, 0) * INDEXED, last * INDEXED)
        low, high = np.searchsorted(marks, bounds, side="right").tolist()
        return (marks[low - 1] if low else None), marks[low:high], max(first - 1, 0) * INDEXED + low

    def _index(self, shard: int) -> Any:
        numbers = range(0, self._ends.lengths[shard], COUNTED_TOGETHER)
        return np.concatenate([self._ends.read(shard, at, at + COUNTED_TOGETHER)[::INDEXED] for at in numbers])

    def _sample(self, tokens: Any, marks: Any, begins_document: bool, epoch: int) -> Sample:
        """A sample of documents with these marks: twice the place of their end in it, plus one if they are pieces."""
        ends, is_piece = marks // 2, marks % 2 == 1
        if (np.diff(ends, prepend=0) < 1).any() or (ends > len(tokens)).any() or (tokens >= self._vocab_size).any():
            raise DataError(f"{self._directory}: no prepared data: documents end nowhere, or ids are no tokens")
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
        """Raises DataError naming a file that is not there or not of its size."""
        shards = self.manifest.training if part == "training" else self.manifest.validation
        return TokenDataset(self.directory, shards, self.manifest.token_dtype, self.eos_id, self.vocab_size, retry)

    def validation_samples(
        self, count: int, sequence_length: int, retry: Retry = NO_RETRY, part: tuple[int, int] = (0, 1)
    ) -> list[Sample]:
        """Up to `count` samples from all over the validation documents, the same ones whatever the seed.

        `part` is as in `check_shards`. Raises DataError naming a damaged shard, and TransientReadError.
        """
        tokens = self.tokens("validation", retry)
        check_shards(self.directory, self.manifest.validation, retry=retry, part=part)
        length = sequence_length + 1
        # A last sample of a single token has nothing to predict.
        order = Permutation(max(-(-(len(tokens) - 1) // length), 1), VALIDATION_ORDER)
        numbers = order(range(min(count, order.length)))
        return [tokens.sample(int(number) * length, length, epoch=0) for number in numbers]


class ShuffledTokenDataset:
    """Training samples in random order: what stands at a place of an epoch is a function of (seed, epoch, place) alone.

    Sample r is the tokens from r (S+1) on; the last one is padded. The state is how many samples were issued to all
    ranks, so that any number of ranks goes on at once from any place.
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
        self.sample_length = sequence_length + 1
        self.seed = seed
        self._retry, self._part = retry, part
        self._issued = 0
        self._numbers: tuple[tuple[int, int], Any] = ((-1, -1), None)  # a block of the order, by epoch and number
        self._known: dict[str, list[int]] = {}  # files as they were when their checksums were last seen to be right
        self._checked: dict[str, list[int]] | None = None  # the same, for this process

    @property
    def samples_per_epoch(self) -> int:
        return -(-len(self.tokens) // self.sample_length)

    def take(self, batch: int, count: int) -> list[Sample]:
        """The next `count` samples. Raises DataError, before the first, for a damaged shard; TransientReadError."""
        if self._checked is None:
            shards = self.prepared.manifest.training
            self._checked = check_shards(self.prepared.directory, shards, self._known, self._retry, self._part)
        self._issued += count
        return [self.at(index) for index in range(self._issued - count, self._issued)]

    def skip(self, batch: int, count: int) -> None:
        self._issued += count

    def at(self, index: int) -> Sample:
        """The sample with a number over all epochs."""
        epoch, place = divmod(index, self.samples_per_epoch)
        return self.tokens.sample(self._number(epoch, place) * self.sample_length, self.sample_length, epoch)

    def _number(self, epoch: int, place: int) -> int:
        block, within = divmod(place, NUMBERS_AT_ONCE)
        key = (epoch, block)
        if self._numbers[0] != key:
            places = range(block * NUMBERS_AT_ONCE, min((block + 1) * NUMBERS_AT_ONCE, self.samples_per_epoch))
            self._numbers = key, Permutation(self.samples_per_epoch, (self.seed, epoch))(places)
        return int(self._numbers[1][within])

    def state_dict(self) -> dict[str, Any]:
        """The place, and what is known of the files: of those that are compared here, once they were."""
        checked = self._known if self._checked is None else self._checked
        return {"prepared": self.fingerprint, "rows": self._issued, "checked": checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the state is of other data."""
        if state.get("prepared") != self.fingerprint:
            raise ConfigError(
                f"{self.prepared.directory}: not the data of the checkpoint. Give that as data.prepared, or start a "
                "new run"
            )
        self._issued, self._known, self._checked = state["rows"], state["checked"], None
