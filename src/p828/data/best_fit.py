"""Rows in which as many documents as possible stay whole, and every token has its place."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens `start` to `end` of a document."""

    document: int
    start: int
    end: int


def best_fit(lengths: Sequence[int], row_length: int, fills: bool = True) -> list[list[Piece]]:
    """Rows of pieces of documents, given by their lengths in tokens; all rows but the last are full, if `fills`.

    What is longer than a row gives full rows first. The rest is packed best fit decreasing: the longest first, each
    to the row with the least room that takes it whole (Ding et al., "Fewer Truncations Improve Language Modeling",
    arXiv 2404.10830). The rooms that are left are filled with pieces of documents from the emptiest rows, so that
    nothing is padded: only those are split. Without `fills` the rooms stay, and what fits in a row is never split.
    """
    rows: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, length in enumerate(lengths):
        whole = length - length % row_length
        rows += [[Piece(document, start, start + row_length)] for start in range(0, whole, row_length)]
        if whole < length:
            rests.append(Piece(document, whole, length))
    packed = _pack(rests, row_length)
    return rows + (_fill(packed, row_length) if fills else packed)


def _pack(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # room and number of every row that has some, sorted
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):  # the longest first; equal ones in order
        size = piece.end - piece.start
        at = bisect_left(rooms, (size, 0))
        if at == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(piece)
        if room > size:
            insort(rooms, (room - size, row))
    return rows


def _fill(rows: list[list[Piece]], row_length: int) -> list[list[Piece]]:
    """Break up the emptiest rows to fill the others. The longest documents go first: few are split, in many pieces."""
    tokens = [sum(piece.end - piece.start for piece in row) for row in rows]
    fullest = sorted(range(len(rows)), key=lambda row: -tokens[row])
    full = sum(tokens) // row_length
    loose = sorted((piece for row in fullest[full:] for piece in rows[row]), key=lambda piece: piece.end - piece.start)
    for row in fullest[:full]:
        room = row_length - tokens[row]
        while room:
            document, start, end = loose.pop()
            cut = min(start + room, end)
            rows[row].append(Piece(document, start, cut))
            if cut < end:
                loose.append(Piece(document, cut, end))
            room -= cut - start
    return [*(rows[row] for row in fullest[:full]), *([loose] if loose else [])]
