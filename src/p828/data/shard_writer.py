"""Writes documents' tokens to shards, so that an interrupted writer goes on from the last position that was saved."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.data.best_fit import best_fit
from p828.data.manifest import DOCUMENTS, TOKENS, ShardEntry, checksum_of
from p828.data.prepared import DOCUMENT_ENDS
from p828.errors import UserError

PARTIAL = ".partial"
PACKED_ROWS = 1024  # in whose rows documents are fitted together

Document = npt.NDArray[np.int64]


class ShardWriter:
    """Appends documents to numbered shards of whole documents, each complete once it holds `shard_tokens` tokens."""

    def __init__(
        self, directory: Path, part: str, dtype: np.dtype[Any], shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        """Begin, or go on from a state: what was written after it is cut off. Raises UserError if less is there."""
        self.directory, self.part, self.dtype, self.shard_tokens = directory, part, dtype, shard_tokens
        self.complete: list[ShardEntry] = []
        if state is None:
            self._open(tokens=0, documents=0)
        else:
            self.complete += [ShardEntry(**shard) for shard in state["complete"]]
            self._reopen(state["tokens"], state["documents"])

    @property
    def name(self) -> str:
        """Of the shard being written."""
        return f"{self.part}-{len(self.complete):05}"

    def write(self, documents: Sequence[Document]) -> None:
        """Append documents, each with its EOS."""
        for document in documents:
            self.write_one(document, is_piece=False)

    def write_one(self, document: Document, is_piece: bool) -> None:
        """Append a document or a piece of one."""
        self._files[TOKENS].write(document.astype(self.dtype).tobytes())
        self._tokens += len(document)
        self._documents += 1
        self._files[DOCUMENTS].write(np.array(2 * self._tokens + is_piece, DOCUMENT_ENDS).tobytes())
        if self._tokens >= self.shard_tokens:
            self._complete()
            self._open(tokens=0, documents=0)

    def close(self) -> None:
        """Complete the last shard, unless nothing was written to it."""
        if self._documents:
            self._complete()
            return
        for ending, file in self._files.items():
            file.close()
            self._path(ending).unlink()

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        complete = [vars(shard) for shard in self.complete]
        return {"complete": complete, "tokens": self._tokens, "documents": self._documents}

    def _path(self, ending: str) -> Path:
        return self.directory / (self.name + ending + PARTIAL)

    def _lengths(self, tokens: int, documents: int) -> dict[str, int]:
        return {TOKENS: tokens * self.dtype.itemsize, DOCUMENTS: documents * DOCUMENT_ENDS.itemsize}

    def _reopen(self, tokens: int, documents: int) -> None:
        for ending, length in self._lengths(tokens, documents).items():
            path, final = self._path(ending), self.directory / (self.name + ending)
            if final.exists():  # completed after the state was saved
                os.replace(final, path)
            if not path.exists() or path.stat().st_size < length:
                raise UserError(f"{path}: shorter than when the preparation was interrupted. Remove {self.directory}")
        self._open(tokens, documents)

    def _open(self, tokens: int, documents: int) -> None:
        self._tokens, self._documents = tokens, documents
        lengths = self._lengths(tokens, documents)
        self._files = {ending: self._path(ending).open("ab") for ending in lengths}
        for ending, length in lengths.items():
            self._files[ending].truncate(length)

    def _complete(self) -> None:
        checksums = {}
        for ending, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            checksums[ending] = checksum_of(self._path(ending))
            os.replace(self._path(ending), self.directory / (self.name + ending))
        self.complete.append(ShardEntry(self.name, self._tokens, self._documents, checksums))


class BestFitWriter:
    """Writes documents in such an order, and in such pieces, that rows of one length cut few of them.

    Documents wait until they fill some rows. What fills no row goes on waiting, and is part of the state.
    """

    def __init__(self, shards: ShardWriter, row_length: int, state: dict[str, Any] | None = None) -> None:
        self.shards, self.row_length = shards, row_length
        self._waiting: list[tuple[Document, bool]] = []  # and whether it is a piece
        if state is not None:
            tokens = np.frombuffer(base64.b64decode(state["waiting"]), "<u4").astype(np.int64)
            documents = np.split(tokens, np.cumsum(state["lengths"])[:-1])
            self._waiting = list(zip(documents, state["pieces"], strict=True)) if state["lengths"] else []

    @property
    def complete(self) -> list[ShardEntry]:
        return self.shards.complete

    def write(self, documents: Sequence[Document]) -> None:
        """Take documents, each with its EOS."""
        self._waiting += [(document, False) for document in documents]
        if sum(len(document) for document, _ in self._waiting) >= PACKED_ROWS * self.row_length:
            self._pack()

    def close(self) -> None:
        self._pack()
        for document, is_piece in self._waiting:
            self.shards.write_one(document, is_piece)
        self.shards.close()

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns, and what waits."""
        tokens = b"".join(document.astype("<u4").tobytes() for document, _ in self._waiting)
        return {
            "waiting": base64.b64encode(tokens).decode(),
            "lengths": [len(document) for document, _ in self._waiting],
            "pieces": [is_piece for _, is_piece in self._waiting],
            **self.shards.state_dict(),
        }

    def _pack(self) -> None:
        documents, self._waiting = self._waiting, []
        for pieces in best_fit([len(document) for document, _ in documents], self.row_length):
            row = [
                (documents[i][0][start:end], documents[i][1] or end - start < len(documents[i][0]))
                for i, start, end in pieces
            ]
            if sum(len(document) for document, _ in row) < self.row_length:
                self._waiting = row
                return
            for document, is_piece in row:
                self.shards.write_one(document, is_piece)
