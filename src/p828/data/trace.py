"""From the rows of a batch back to their documents: source, shard, number and first words of each.

The packers note with each sample where its documents come from (`batch.DocumentPlace`), so that a batch can be named
while the run trains, and nothing need be read again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.data.batch import PADDING, Batch
from p828.data.tokenizer.tokenizer import Tokenizer

FIRST_TOKENS = 64  # of a document in a row that are decoded
FIRST_CHARACTERS = 100  # of them that are kept
LONGEST_NGRAM = 13  # tokens
MANY_REPEATS = 32
"""Repetitions of an n-gram of 1 to 13 tokens from which OLMo 2 leaves a document out, since such rows come with spikes
of the gradient norm (arXiv 2501.00656)."""


@dataclass(frozen=True)
class TracedDocument:
    """A document, or the part of it that is in one row."""

    shard: str
    """Path of the file or of the shard of prepared data, or name of the hub's shard."""
    record: int
    """Its number in the shard, from 0: of a line, a row, or a piece of a large text file."""
    start: int
    """Tokens of it before those in the row."""
    tokens: int
    """Of it in the row."""
    text: str
    """The first words of it in the row, in one line."""

    def in_words(self) -> str:
        begin = f", from its token {self.start:,} on" if self.start else ""
        return f"{self.shard}, document {self.record:,}{begin}: “{self.text}”"


@dataclass(frozen=True)
class TracedRow:
    """A row of a step's batch."""

    source: str
    """The source's name, as in records."""
    documents: tuple[TracedDocument, ...]
    repeats: int
    """How often an n-gram of at most 13 tokens comes at most, in a row without anything between: 1 in plain text."""

    def in_words(self) -> str:
        return f"{self.source}: " + "; ".join(document.in_words() for document in self.documents)


def traced_rows(batches: Sequence[Batch], source_names: Sequence[str], tokenizer: Tokenizer) -> list[TracedRow]:
    """The rows of training batches, in their order. Takes some milliseconds a row, and reads no data."""
    return [row for batch in batches for row in _rows_of(batch, source_names, tokenizer)]


def named(rows: Sequence[TracedRow], most: int = 3) -> str:
    """The rows that are likeliest to have made a loss jump, in a few sentences, with their documents' first words.

    Those with repeated n-grams come first; where no row has many, the first rows are examples.
    """
    odd = sorted((row for row in rows if row.repeats >= MANY_REPEATS), key=lambda row: -row.repeats)
    chosen = (odd or list(rows))[:most]
    what = f"{len(odd)} of its {len(rows)} rows repeat an n-gram {MANY_REPEATS} times or more" if odd else ""
    lines = [
        (f"{row.source}, {row.repeats} repeats, " if odd else f"{row.source}, ")
        + max(row.documents, key=lambda document: document.tokens).in_words()
        for row in chosen
        if row.documents
    ]
    left = len(rows) - len(chosen)
    more = f"and {left} rows more" if left else ""
    return "; ".join(filter(None, (what, *lines, more)))


def _rows_of(batch: Batch, source_names: Sequence[str], tokenizer: Tokenizer) -> Iterator[TracedRow]:
    tokens_BS, document_ids_BS = batch.tokens_BS.numpy(), batch.document_ids_BS.numpy()
    for (source, places), tokens_S, ids_S in zip(batch.places, tokens_BS, document_ids_BS, strict=True):
        documents = []
        for number, place in enumerate(places):
            own = tokens_S[ids_S == number]
            if len(own):  # else it begins with the row's last token, which is only predicted
                text = " ".join(tokenizer.decode(own[:FIRST_TOKENS].tolist()).split())
                documents.append(TracedDocument(*place, len(own), text[:FIRST_CHARACTERS]))
        yield TracedRow(source_names[source], tuple(documents), longest_repeat(tokens_S[ids_S != PADDING]))


def longest_repeat(tokens: npt.NDArray[Any]) -> int:
    """How often one n-gram of 1 to 13 tokens follows upon itself at most, counted from 1."""
    most = 1
    for n in range(1, min(LONGEST_NGRAM, len(tokens) - 1) + 1):
        is_equal = np.concatenate([[False], tokens[n:] == tokens[:-n], [False]])
        changes = np.flatnonzero(np.diff(is_equal))
        if len(changes):
            most = max(most, int((changes[1::2] - changes[::2]).max()) // n + 1)
    return most
