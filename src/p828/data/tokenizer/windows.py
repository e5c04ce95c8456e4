"""Tokens of a long text whose borders are not known, by windows that overlap.

A window's tokens are wrong, if anywhere, near its ends, where text is missing. Two windows that overlap are joined at a
place where both have the same tokens, some before it and some behind, each where the other has it and with text around
them on both sides. Where there is none, the window is made twice as long.

So the tokens are those of the whole text for a BPE, whatever comes before or behind: a sequence of tokens is what BPE
makes of the text if each two neighbours are what it makes of theirs, and each two neighbours are from one window. They
are as well for whatever divides the text into pieces that are shorter than the text around.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt
import tokenizers

WINDOW, OVERLAP = 2**15, 2**12  # characters
AGREEING = 8  # tokens on either side of the place where windows are joined
PLACES = 4  # in a window, where the next one is tried to begin

Ids = npt.NDArray[np.int64]
Encode = Callable[[str], tokenizers.Encoding]


class Window:
    """The tokens of a part of a text, with their places in the text."""

    def __init__(self, text: str, start: int, stop: int, encode: Encode) -> None:
        encoding = encode(text[start:stop])
        self.start, self.stop = start, min(stop, len(text))
        self.ids: Ids = np.array(encoding.ids, dtype=np.int64)
        places = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(self.ids))
        self.tokens: Ids = np.column_stack([places.reshape(-1, 2) + start, self.ids])
        """Where each token begins and ends, and its id."""


def encode_in_windows(text: str, encode: Encode) -> Iterator[tuple[Ids, Ids]]:
    """The ids of the text's tokens and where each of them ends, a part at a time."""
    window, taken = Window(text, 0, WINDOW, encode), 0
    while window.stop < len(text):
        joined = _next(text, window, taken, encode)
        if joined is None:
            window = Window(text, window.start, window.start + 2 * (window.stop - window.start), encode)
            continue
        following, until, begin = joined
        yield window.ids[taken:until], window.tokens[taken:until, 1]
        window, taken = following, begin
    yield window.ids[taken:], window.tokens[taken:, 1]


def _next(text: str, window: Window, taken: int, encode: Encode) -> tuple[Window, int, int] | None:
    """The following window, the number of this one's tokens before the place where they join, and of that one's."""
    starts = window.tokens[:, 0]
    first = max(int(np.searchsorted(starts, window.stop - OVERLAP)), taken + AGREEING)
    for start in _beginnings(text, starts[first:]):
        following = Window(text, start, start + WINDOW, encode)
        least, most = start + (window.stop - start) // 4, start + 3 * (window.stop - start) // 4
        for until in range(*np.searchsorted(starts, (least, most))):
            begin = int(np.searchsorted(following.tokens[:, 0], starts[until]))
            if _agree(window.tokens, until, following.tokens, begin):
                return following, until, begin
    return None


def _beginnings(text: str, starts: Ids) -> list[int]:
    """Where the next window is tried to begin: before a space if there are any, at a token in any case."""
    before_space = [start for start in map(int, starts) if text[start] == " "][:PLACES]
    return before_space or [int(start) for start in starts[:PLACES]]


def _agree(tokens: Ids, at: int, others: Ids, other_at: int) -> bool:
    if min(at, other_at) < AGREEING or at + AGREEING > len(tokens):
        return False
    some, same = tokens[at - AGREEING : at + AGREEING], others[other_at - AGREEING : other_at + AGREEING]
    return np.array_equal(some, same)
