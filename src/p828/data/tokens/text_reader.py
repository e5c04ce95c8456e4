"""The documents of a source in batches, filtered and divided into training and validation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from p828.config import PrepareConfig, ValidationConfig
from p828.data.text.documents import DocumentStream, divided
from p828.data.text.packing import BATCH_CHARACTERS, BATCH_DOCUMENTS
from p828.data.tokens.filters import SeenTexts, reason_to_drop

PARTS = ("training", "validation")


@dataclass
class TextBatch:
    """Documents to tokenize together, and the reader's position after them."""

    texts: dict[str, list[str]]
    """By part."""
    hashes: list[int]
    """Of the batch's texts, if copies are to be dropped."""
    characters: int
    position: dict[str, Any]
    counts: dict[str, int]
    """Of documents so far: read, kept for each part, and left out for each reason; and records passed over."""


class Reader:
    """Iterator of the source's documents in its own order, filtered and divided into parts."""

    def __init__(
        self, stream: DocumentStream, part: str, prepare: PrepareConfig, validation: ValidationConfig, seen: SeenTexts
    ) -> None:
        """`part` takes the documents that are not held out."""
        self.stream, self.part, self.seen = stream, part, seen
        self.prepare, self.validation = prepare, validation
        self.counts = dict.fromkeys(("read", *PARTS), 0)

    def __iter__(self) -> Iterator[TextBatch]:
        batch = self._empty()
        for text in self.stream:
            reason = self._reason_to_drop(text, batch)
            parts = {} if reason else self._parts_of(text)
            for part, piece in parts.items():
                batch.texts[part].append(piece)
            self.counts["read"] += 1
            for kind in [reason] if reason else parts:
                self.counts[kind] = self.counts.get(kind, 0) + 1
            batch.characters += len(text)
            if batch.characters >= BATCH_CHARACTERS or sum(map(len, batch.texts.values())) == BATCH_DOCUMENTS:
                yield self._finish(batch)
                batch = self._empty()
        yield self._finish(batch)

    def position(self) -> TextBatch:
        """No text, at the place where reading goes on."""
        return self._finish(self._empty())

    def _empty(self) -> TextBatch:
        return TextBatch({part: [] for part in PARTS}, [], 0, {}, {})

    def _finish(self, batch: TextBatch) -> TextBatch:
        if self.stream.bad_records:
            self.counts["bad_records"] = self.stream.bad_records
        # `stopped` is one list: where reading ends at a bad record, positions of before know of it.
        batch.position = {**self.stream.state_dict(), "stopped": self.stream.stopped}
        batch.counts = dict(self.counts)
        return batch

    def _reason_to_drop(self, text: str, batch: TextBatch) -> str | None:
        if reason := reason_to_drop(text, self.prepare):
            return reason
        if self.prepare.drop_duplicates:
            new = self.seen.add(text)
            if new is None:
                return "duplicate"
            batch.hashes.append(new)
        return None

    def _parts_of(self, text: str) -> dict[str, str]:
        """The document, or its beginning and its end, by the part that takes it."""
        if self.validation.kind != "held_out":
            return {self.part: text}
        training, held_out = divided(text, self.validation.fraction, self.stream.by_end)
        return {part: piece for part, piece in ((self.part, training), ("validation", held_out)) if piece}
