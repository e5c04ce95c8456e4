"""Writes documents' tokens to shards, so that an interrupted writer goes on from the last position that was saved."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from p828.data.best_fit import best_fit
from p828.data.tokens.format import DOCUMENTS, TOKENS, ShardEntry
from p828.data.tokens.read import DOCUMENT_ENDS
from p828.errors import ConfigError
from p828.files import MEBIBYTE, open_appended, open_regular

PARTIAL = ".partial"
PACKED_ROWS = 1024  # in whose rows documents are fitted together
SHARDS_OF_A_SIZE = 4096  # then they become twice as large, so that the manifest has room for any number of tokens
WAITING = np.dtype("<u4")

Document = npt.NDArray[np.int64]


class PartialFile:
    """Bytes are only added. A state is a length and the checksum (xxh3-128) of what the file holds up to there.

    The file is not buffered by Python, which would try to write what is left when there is no room for it.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None, finished: Path | None = None) -> None:
        """Begin an empty file, or go on with what `path` held, or `finished`, which it was renamed to, at a state.

        What comes after the state is cut off before anything is added, and not before. Raises ConfigError if the file
        is not what it was, and OSError, as for anything but a regular file.
        """
        self.path, self._pending = path, bytearray()
        self._file: BinaryIO | None = None
        self._hash = xxhash.xxh3_128()
        self._written = 0 if state is None else int(state["bytes"])
        self._now = finished if finished is not None and os.path.lexists(finished) else path
        if state is None:
            self._now = path
            self._begin()
        elif self._written:
            self._verify(state["xxh3_128"])

    def __len__(self) -> int:
        """Bytes that were added, from the beginning."""
        return self._written + len(self._pending)

    def add(self, data: bytes) -> None:
        """Raises OSError; what has been added since the last state is lost then."""
        self._pending += data
        if len(self._pending) >= MEBIBYTE:
            self._flush()

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns. Raises OSError."""
        file = self._flush()
        os.fsync(file.fileno())
        return {"bytes": self._written, "xxh3_128": self._hash.hexdigest()}

    def chunks(self) -> Iterator[bytes]:
        """What the file holds up to the state that it was opened with. Raises OSError."""
        left = self._written
        if not left:
            return
        with open_regular(self._now) as file:
            while left and (data := file.read(min(left, MEBIBYTE))):
                left -= len(data)
                yield data

    def finish(self, path: Path) -> str:
        """Have all of it on the disk under another name, for good. Returns its checksum. Raises OSError."""
        checksum: str = self.state_dict()["xxh3_128"]
        self.close()
        os.replace(self.path, path)
        return checksum

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _verify(self, checksum: str) -> None:
        remove = f"Remove {self.path.parent} to begin again"
        try:
            if self._now.is_symlink():
                raise ConfigError(f"{self._now}: is a link; a regular file is accepted")
            size = 0
            for data in self.chunks():
                size += len(data)
                self._hash.update(data)
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: gone since the preparation was interrupted. {remove}") from None
        if size < self._written or self._hash.hexdigest() != checksum:
            raise ConfigError(f"{self._now}: changed since the preparation was interrupted. {remove}")

    def _begin(self) -> BinaryIO:
        if self._file is None:
            if self._now != self.path:
                os.replace(self._now, self.path)
            self._file = open_appended(self.path)
            self._file.truncate(self._written)
        return self._file

    def _flush(self) -> BinaryIO:
        file = self._begin()
        self._hash.update(self._pending)
        left = memoryview(bytes(self._pending))
        self._pending.clear()
        while left:
            try:
                count = file.write(left)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self._written += count
            left = left[count:]
        return file


class ShardWriter:
    """Appends documents to numbered shards of whole documents, each complete once it holds `shard_tokens` tokens.

    After 4,096 shards it is twice as many tokens, after as many more four times, and so on.
    """

    def __init__(
        self, directory: Path, part: str, dtype: np.dtype[Any], shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        """Begin, or go on from a state: what was written after it is cut off, once something is added or saved.

        Raises ConfigError if what the state speaks of is not there, or has changed, and OSError.
        """
        self.directory, self.part, self.dtype, self.shard_tokens = directory, part, dtype, shard_tokens
        self.complete: list[ShardEntry] = []
        if state is None:
            self._open()
        else:
            self.complete += [ShardEntry(**shard) for shard in state["complete"]]
            self._check_sizes()
            self._open(state)

    @property
    def name(self) -> str:
        """Of the shard being written."""
        return f"{self.part}-{len(self.complete):05}"

    def write(self, documents: Sequence[Document]) -> None:
        """Append documents, each with its EOS. Raises OSError."""
        for document in documents:
            self.write_one(document, is_piece=False)

    def write_one(self, document: Document, is_piece: bool) -> None:
        """Append a document or a piece of one. Raises OSError."""
        self._files[TOKENS].add(document.astype(self.dtype).tobytes())
        self._tokens += len(document)
        self._documents += 1
        self._files[DOCUMENTS].add(np.array(2 * self._tokens + is_piece, DOCUMENT_ENDS).tobytes())
        if self._tokens >= self.shard_tokens << len(self.complete) // SHARDS_OF_A_SIZE:
            self._complete()
            self._open()

    def close(self) -> None:
        """Complete the last shard, unless nothing was written to it. Raises OSError."""
        if self._documents:
            self._complete()
            return
        for file in self._files.values():
            file.close()
            file.path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns. Raises OSError."""
        return {
            "complete": [vars(shard) for shard in self.complete],
            "tokens": self._tokens,
            "documents": self._documents,
            "files": {ending: file.state_dict() for ending, file in self._files.items()},
        }

    def saved(self) -> None:
        """The last state was saved. It needs all that is there."""

    def _open(self, state: dict[str, Any] | None = None) -> None:
        self._tokens: int = state["tokens"] if state else 0
        self._documents: int = state["documents"] if state else 0
        self._files: dict[str, PartialFile] = {}
        for ending in (TOKENS, DOCUMENTS):
            finished = self.directory / (self.name + ending)
            partial = finished.with_name(finished.name + PARTIAL)
            self._files[ending] = PartialFile(partial, state["files"][ending] if state else None, finished)

    def _check_sizes(self) -> None:
        for shard in self.complete:
            sizes = {TOKENS: shard.tokens * self.dtype.itemsize, DOCUMENTS: shard.documents * DOCUMENT_ENDS.itemsize}
            for ending, size in sizes.items():
                path = self.directory / (shard.name + ending)
                if not path.is_file() or path.stat().st_size != size:
                    raise ConfigError(
                        f"{path}: gone or of another size since the preparation was interrupted. Remove "
                        f"{self.directory} to begin again"
                    )

    def _complete(self) -> None:
        checksums = {}
        for ending, file in self._files.items():
            checksums[ending] = file.finish(self.directory / (self.name + ending))
        self.complete.append(ShardEntry(self.name, self._tokens, self._documents, checksums))


class BestFitWriter:
    """Writes documents in such an order, and in such pieces, that samples of one length split few of them.

    Documents wait until they fill some rows. What fills no row goes on waiting. What waits is in a file of its own, to
    which new documents are added; after each packing a new file begins, and the one before goes once that is saved.
    """

    def __init__(self, shards: ShardWriter, row_length: int, state: dict[str, Any] | None = None) -> None:
        """Begin, or go on from a state. Raises ConfigError if what waits is not as it was, and OSError."""
        self.shards, self.row_length = shards, row_length
        self._waiting: list[tuple[Document, bool]] = []  # and whether it is a piece
        self._generation = 0 if state is None else state["generation"]
        self._file = PartialFile(self._path(self._generation), None if state is None else state["waiting"])
        if state is not None:
            self._waiting = _documents(b"".join(self._file.chunks()))
        self._outdated = [path for path in self._paths() if path != self._file.path]

    @property
    def complete(self) -> list[ShardEntry]:
        return self.shards.complete

    def write(self, documents: Sequence[Document]) -> None:
        """Take documents, each with its EOS. Raises OSError."""
        self._wait([(document, False) for document in documents])
        if sum(len(document) for document, _ in self._waiting) >= PACKED_ROWS * self.row_length:
            self._pack()

    def close(self) -> None:
        """Write what waits. Its file stays, for an interrupted process that goes on from the last state."""
        self._pack()
        for document, is_piece in self._waiting:
            self.shards.write_one(document, is_piece)
        self._file.close()
        self.shards.close()

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns. Raises OSError."""
        return {"generation": self._generation, "waiting": self._file.state_dict(), **self.shards.state_dict()}

    def saved(self) -> None:
        """The last state was saved: what only those before it need is removed. Raises OSError."""
        for path in self._outdated:
            path.unlink(missing_ok=True)
        self._outdated = []

    def _path(self, generation: int) -> Path:
        return self.shards.directory / f"{self.shards.part}-waiting-{generation}{PARTIAL}"

    def _paths(self) -> list[Path]:
        return list(self.shards.directory.glob(f"{self.shards.part}-waiting-*{PARTIAL}"))

    def _wait(self, documents: Sequence[tuple[Document, bool]]) -> None:
        self._waiting += documents
        for document, is_piece in documents:
            self._file.add(np.concatenate([[2 * len(document) + is_piece], document]).astype(WAITING).tobytes())

    def _pack(self) -> None:
        documents, self._waiting = self._waiting, []
        self._file.close()
        self._outdated.append(self._file.path)
        self._generation += 1
        self._file = PartialFile(self._path(self._generation))
        for pieces in best_fit([len(document) for document, _ in documents], self.row_length):
            row = [
                (documents[i][0][start:end], documents[i][1] or end - start < len(documents[i][0]))
                for i, start, end in pieces
            ]
            if sum(len(document) for document, _ in row) < self.row_length:
                self._wait(row)
                return
            for document, is_piece in row:
                self.shards.write_one(document, is_piece)


def _documents(content: bytes) -> list[tuple[Document, bool]]:
    """What a file of waiting documents holds: for each its length, twice, plus one if it is a piece, and its tokens."""
    numbers = np.frombuffer(content, WAITING).astype(np.int64)
    documents, at = [], 0
    while at < len(numbers):
        length, is_piece = divmod(int(numbers[at]), 2)
        documents.append((numbers[at + 1 : at + 1 + length], bool(is_piece)))
        at += 1 + length
    return documents
