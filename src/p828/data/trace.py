"""From the rows of a batch back to their documents: source, shard, number and first words of each.

The packers note with each sample where its documents come from (`batch.DocumentPlace`), so that a batch can be named
while the run trains, and nothing need be read again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    rare_tokens: int
    """Those of them that no other row of the step has."""
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
    rows_with = Counter(token for batch in batches for row in batch.tokens_BS.numpy() for token in set(row.tolist()))
    return [row for batch in batches for row in _rows_of(batch, source_names, tokenizer, rows_with)]


def named(rows: Sequence[TracedRow], most: int = 3) -> str:
    """The documents that are likeliest to have made a loss jump, in a line, with their first words.

    Those in rows with a repeated n-gram come first, then those with the most tokens that no other row has. The loss of
    each row is not known here: `p828 batch RUN --step N --losses` computes it.
    """
    odd = {id(row): row.repeats for row in rows if row.repeats >= MANY_REPEATS}
    pairs = [(row, document) for row in rows for document in row.documents]
    pairs.sort(key=lambda pair: (-odd.get(id(pair[0]), 0), -pair[1].rare_tokens))
    ranked: dict[tuple[str, int], str] = {}  # a document may be in several rows
    for row, document in pairs:
        ranked.setdefault((document.shard, document.record), f"{row.source}: {document.in_words()}")
    words = [f"{len(odd)} of {len(rows)} rows repeat an n-gram {MANY_REPEATS} times or more"] if odd else []
    words += list(ranked.values())[:most]
    left = len(ranked) - most
    more = f"and {left} more document" + ("s" if left > 1 else "")
    return "; ".join([*words, *([more] if left > 0 else [])])


def _rows_of(
    batch: Batch, source_names: Sequence[str], tokenizer: Tokenizer, rows_with: Mapping[int, int]
) -> Iterator[TracedRow]:
    tokens_BS, document_ids_BS = batch.tokens_BS.numpy(), batch.document_ids_BS.numpy()
    for (source, places), tokens_S, ids_S in zip(batch.places, tokens_BS, document_ids_BS, strict=True):
        documents = []
        for number, place in enumerate(places):
            own = tokens_S[ids_S == number].tolist()
            if own:  # else it begins with the row's last token, which is only predicted
                text = " ".join(tokenizer.decode(own[:FIRST_TOKENS]).split())
                rare = sum(rows_with[token] == 1 for token in own)
                documents.append(TracedDocument(*place, len(own), rare, text[:FIRST_CHARACTERS]))
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
