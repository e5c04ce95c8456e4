"""Documents to rows by best fit: most stay whole, none loses a token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.data.best_fit import Piece, best_fit
from p828.data.sample import Sample
from p828.data.text.documents import DocumentStream
from p828.data.text.packing import BATCH_CHARACTERS, BATCH_DOCUMENTS
from p828.data.tokenizer import Tokenizer

BLOCK_ROWS = 256  # packed together: more would cut few documents less, and a resume packs them again
MOST_CHARACTERS = 2**26  # of documents that are held as text


class BestFitPacker:
    """Iterator of `Sample`s: every token of every document once.

    Documents are packed by blocks of some 256 rows, which end with the epoch; a block's last row is padded. The state
    is the stream's before the block, and how many of its rows were given.
    """

    def __init__(self, stream: DocumentStream, tokenizer: Tokenizer, sequence_length: int) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.row_length = sequence_length + 1
        self._begin = stream.state_dict()
        self._rows: Iterator[Sample] | None = None
        self._given = 0

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        """Raises what reading the stream raises; StopIteration at its end."""
        while True:
            if self._rows is None:
                self._rows = self._pack_block(skipped=self._given)
            row = next(self._rows, None)
            if row is not None:
                self._given += 1
                return row
            if self.stream.state_dict() == self._begin:
                raise StopIteration
            self._begin, self._rows, self._given = self.stream.state_dict(), None, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row given."""
        return {"stream": self._begin, "rows": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `DocumentStream.load_state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self._begin, self._given, self._rows = state["stream"], state["rows"], None

    def _pack_block(self, skipped: int) -> Iterator[Sample]:
        documents, epoch = self._read_block()
        packed = best_fit([len(document) for document in documents], self.row_length)
        return (self._row(pieces, documents, epoch) for pieces in packed[skipped:])

    def _read_block(self) -> tuple[list[npt.NDArray[np.int64]], int]:
        """The documents of a block, with EOS, and their epoch."""
        documents: list[npt.NDArray[np.int64]] = []
        epoch: int | None = None
        tokens = 0
        while tokens < BLOCK_ROWS * self.row_length:
            texts: list[str] = []
            characters = 0
            before = self.stream.state_dict()
            for text in self.stream:
                if epoch not in (None, self.stream.epoch):
                    self.stream.load_state_dict(before)  # the next epoch begins a block
                    break
                epoch = self.stream.epoch
                texts.append(text)
                characters += len(text)
                if len(texts) == BATCH_DOCUMENTS or characters >= MOST_CHARACTERS:
                    break
                before = self.stream.state_dict()
            new = self._encoded(texts)
            documents += new
            tokens += sum(map(len, new))
            if len(texts) < BATCH_DOCUMENTS and characters < MOST_CHARACTERS:
                break
        return documents, epoch or 0

    def _encoded(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Some at a time, as what the tokenizer makes on the way takes a hundred times a text's memory."""
        documents: list[npt.NDArray[np.int64]] = []
        together: list[str] = []
        for text in texts:
            together.append(text)
            if sum(map(len, together)) >= BATCH_CHARACTERS:
                documents += self.tokenizer.encode_documents(together)
                together = []
        return documents + self.tokenizer.encode_documents(together)

    def _row(self, pieces: Sequence[Piece], documents: Sequence[npt.NDArray[np.int64]], epoch: int) -> Sample:
        tokens = np.concatenate([documents[piece.document][piece.start : piece.end] for piece in pieces])
        ids = np.repeat(np.arange(len(pieces), dtype=np.int32), [piece.end - piece.start for piece in pieces])
        ended = [piece for piece in pieces if piece.end == len(documents[piece.document])]
        cut = sum(piece.start > 0 for piece in ended)
        row = Sample(tokens, ids, epoch, len(ended), cut)
        return row.padded(self.row_length, self.tokenizer.eos_id)
