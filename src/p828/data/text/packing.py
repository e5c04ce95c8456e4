"""Documents to samples of tokens: end to end, or by best fit. Each document is followed by EOS."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from p828.data.batch import DocumentPlace, Sample
from p828.data.best_fit import Piece, best_fit
from p828.data.text.documents import DocumentStream
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError

BATCH_DOCUMENTS = 256  # tokenized together: enough to keep all cores busy,
BATCH_CHARACTERS = 1_000_000  # and little enough to hold
BLOCK_ROWS = 256  # packed together: more would split few documents less, and a resume packs them again
MOST_CHARACTERS = 2**26  # of documents that are held as text


class Packing(Protocol):
    """Samples in the order of their text: a `Packer` or a `BestFitPacker`."""

    def __next__(self) -> Sample: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Packer:
    """Iterator of `Sample`s: every token of every document once, in order.

    Ends when the stream ends; the tokens that fill no sample are then `remainder()`. The state is the stream's before
    the document in which the next sample starts, and how many of that document's tokens were consumed.
    """

    def __init__(
        self, stream: DocumentStream, tokenizer: Tokenizer, sequence_length: int, counts_bytes: bool = False
    ) -> None:
        """With `counts_bytes`, which takes longer, samples have their `text_bytes`."""
        self.stream = stream
        self.tokenizer = tokenizer
        self.counts_bytes = counts_bytes
        self.sequence_length = sequence_length
        self._first_epoch_tokens: int | None = 0  # None: known to fill a sample
        self._clear(consumed=0)

    def _clear(self, consumed: int) -> None:
        # The tokens read and not yet consumed, and where in them each document starts (the first one's start is
        # below 0 if part of it was consumed). `_states` has the stream's state before each document and after all.
        self._tokens = np.zeros(0, dtype=np.int64)
        self._text_bytes = np.zeros(0, dtype=np.int64)  # of the same tokens, if they are counted
        self._starts = np.zeros(0, dtype=np.int64)
        self._states = [self.stream.state_dict()]
        self._epochs: list[int] = []
        self._places: list[tuple[str, int]] = []  # of each document: its shard and its number there
        self._at = 0
        self._consumed = consumed  # tokens of the next document to drop: they were consumed before a resume

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        """Raises DataError when a whole epoch of an endless stream fills no sample."""
        size = self.sequence_length + 1
        while len(self._tokens) - self._at < size:
            if not self._read():
                raise StopIteration
        sample = self._sample(self._at, self._at + size)
        self._at += size
        return sample

    def remainder(self) -> Sample | None:
        """After the last sample of a stream that ends: the tokens left over, fewer than S+1; None if there are none."""
        return self._sample(self._at, len(self._tokens)) if self._at < len(self._tokens) else None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample."""
        document = self._document_at(self._at)
        if document == len(self._starts):
            return {"stream": self._states[document], "tokens": self._consumed}
        return {"stream": self._states[document], "tokens": int(self._at - self._starts[document])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `DocumentStream.load_state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self._first_epoch_tokens = None
        self._clear(state["tokens"])

    def _sample(self, start: int, end: int) -> Sample:
        first, last = self._document_at(start), self._document_at(end - 1)
        inner_starts = self._starts[first + 1 : last + 1] - start
        steps = np.zeros(end - start, dtype=np.int32)
        steps[inner_starts] = 1
        last_end = self._starts[last + 1] if last + 1 < len(self._starts) else len(self._tokens)
        documents = last - first + int(last_end == end)  # that end here
        split = int(documents > 0 and self._starts[first] < start)
        document_ids = np.cumsum(steps, dtype=np.int32)
        text_bytes = self._text_bytes[start:end] if self.counts_bytes else None
        before = [int(start - self._starts[first]), *([0] * (last - first))]  # tokens, of each document
        parts = zip(self._places[first : last + 1], before, strict=True)
        places = tuple(DocumentPlace(*place, n) for place, n in parts)
        tokens, epoch = self._tokens[start:end], self._epochs[first]
        return Sample(tokens, document_ids, epoch, documents, split, text_bytes=text_bytes, places=places)

    def _document_at(self, position: int) -> int:
        """Number of the document that the token at `position` belongs to; past the end, the number of documents."""
        if position == len(self._tokens):
            return len(self._starts)
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def _read(self) -> bool:
        """Tokenize the next documents, behind the tokens not yet consumed; False if the stream has ended."""
        texts, states, characters = [], [], 0
        epochs, places = [], []
        for text in self.stream:
            texts.append(text)
            epochs.append(self.stream.epoch)
            places.append(self.stream.place())
            states.append(self.stream.state_dict())
            characters += len(text)
            if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                break
        if not texts:
            return False
        if self.counts_bytes:
            documents, byte_counts = map(list, zip(*self.tokenizer.encode_counted(texts), strict=True))
        else:
            documents, byte_counts = self.tokenizer.encode_documents(texts), []
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self._check_first_epoch(lengths, epochs)
        new = np.concatenate(documents)
        starts = np.cumsum(lengths) - lengths

        dropped, self._consumed = self._consumed, 0
        if dropped >= lengths[0]:
            raise DataError(
                f"{self.stream.source}: a document ends before the place of the checkpoint in it: the data changed. "
                "Restore it, or start a new run"
            )
        kept = self._document_at(self._at)
        left = self._tokens[self._at :]
        self._starts = np.concatenate([self._starts[kept:] - self._at, starts - dropped + len(left)])
        self._states = self._states[kept:] + states
        self._epochs = self._epochs[kept:] + epochs
        self._places = self._places[kept:] + places
        self._tokens = np.concatenate([left, new[dropped:]])
        if self.counts_bytes:
            self._text_bytes = np.concatenate([self._text_bytes[self._at :], np.concatenate(byte_counts)[dropped:]])
        self._at = 0
        return True

    def _check_first_epoch(self, lengths: npt.NDArray[np.int64], epochs: list[int]) -> None:
        if self._first_epoch_tokens is None:
            return
        self._first_epoch_tokens += int(lengths[np.array(epochs) == 0].sum())
        if self._first_epoch_tokens > self.sequence_length:
            self._first_epoch_tokens = None
        elif epochs[-1] > 0:
            raise DataError(
                f"data.sequence_length = {self.sequence_length}: {self.stream.source} has {self._first_epoch_tokens} "
                f"tokens in all, less than one row of {self.sequence_length + 1}; "
                + self._remedy(self._first_epoch_tokens)
            )

    @staticmethod
    def _remedy(tokens: int) -> str:
        return f"set at most data.sequence_length = {tokens - 1}, or give more text" if tokens > 1 else "give more text"


class BestFitPacker:
    """Iterator of `Sample`s: every token of every document once.

    Documents are packed by blocks of some 256 samples, which end with the epoch; a block's last sample is padded. The
    state is the stream's before the block, and how many of its samples were consumed.
    """

    fills = True
    """Whether documents are split to fill rows, and not only where they are longer than one."""

    def __init__(self, stream: DocumentStream, tokenizer: Tokenizer, sequence_length: int) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.sample_length = sequence_length + 1
        self._begin = stream.state_dict()
        self._samples: Iterator[Sample] | None = None
        self._consumed = 0

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        """Raises what reading the stream raises; StopIteration at its end."""
        while True:
            if self._samples is None:
                self._samples = self._pack_block(skipped=self._consumed)
            sample = next(self._samples, None)
            if sample is not None:
                self._consumed += 1
                return sample
            if self.stream.state_dict() == self._begin:
                raise StopIteration
            self._begin, self._samples, self._consumed = self.stream.state_dict(), None, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample."""
        return {"stream": self._begin, "rows": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `DocumentStream.load_state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self._begin, self._consumed, self._samples = state["stream"], state["rows"], None

    def _pack_block(self, skipped: int) -> Iterator[Sample]:
        documents, places, epoch = self._read_block()
        packed = best_fit([len(document) for document in documents], self.sample_length, self.fills)
        return (
            replace(
                self._sample(pieces, documents, epoch),
                places=tuple(DocumentPlace(*places[piece.document], piece.start) for piece in pieces),
            )
            for pieces in packed[skipped:]
        )

    def _read_block(self) -> tuple[list[npt.NDArray[Any]], list[tuple[str, int]], int]:
        """The encoded documents of a block, the shard and number of each, and their epoch."""
        documents: list[npt.NDArray[Any]] = []
        places: list[tuple[str, int]] = []
        epoch: int | None = None
        tokens = 0
        while tokens < BLOCK_ROWS * self.sample_length:
            texts: list[str] = []
            characters = 0
            before = self.stream.state_dict()
            for text in self.stream:
                if epoch not in (None, self.stream.epoch):
                    self.stream.load_state_dict(before)  # the next epoch begins a block
                    break
                epoch = self.stream.epoch
                texts.append(text)
                places.append(self.stream.place())
                characters += len(text)
                if len(texts) == BATCH_DOCUMENTS or characters >= MOST_CHARACTERS:
                    break
                before = self.stream.state_dict()
            new = self._encoded(texts)
            documents += new
            tokens += sum(map(len, new))
            if len(texts) < BATCH_DOCUMENTS and characters < MOST_CHARACTERS:
                break
        return documents, places, epoch or 0

    def _encoded(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Tokens of each text. Few texts are encoded at a time, since that takes a hundred times a text's memory."""
        documents: list[npt.NDArray[Any]] = []
        together: list[str] = []
        for text in texts:
            together.append(text)
            if sum(map(len, together)) >= BATCH_CHARACTERS:
                documents += self._encode(together)
                together = []
        return documents + self._encode(together)

    def _encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """What `_tokens` takes of each text, with an entry for each token."""
        return [*self.tokenizer.encode_documents(texts)]

    def _sample(self, pieces: Sequence[Piece], documents: Sequence[npt.NDArray[Any]], epoch: int) -> Sample:
        encoded = [documents[piece.document][piece.start : piece.end] for piece in pieces]
        ids = np.repeat(np.arange(len(pieces), dtype=np.int32), [piece.end - piece.start for piece in pieces])
        ended = [piece for piece in pieces if piece.end == len(documents[piece.document])]
        split = sum(piece.start > 0 for piece in ended)
        sample = replace(self._tokens(encoded, ids), epoch=epoch, documents=len(ended), split_documents=split)
        return sample.padded(self.sample_length, self.tokenizer.eos_id)

    def _tokens(self, encoded: Sequence[npt.NDArray[Any]], document_ids: npt.NDArray[np.int32]) -> Sample:
        """A sample of pieces of encoded documents, end to end."""
        return Sample(np.concatenate(encoded), document_ids)
