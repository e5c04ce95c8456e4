"""Lines about the progress of work that takes long."""

import time
from collections.abc import Callable

FIRST_WORD, NEXT_WORD = 2.0, 30.0  # seconds after which there is a line, and another


class SlowCount:
    """Reports a growing count in lines, the first one after two seconds."""

    def __init__(self, report: Callable[[str], None], words: str) -> None:
        """`words` is the line, with `{:,}` for the count."""
        self._report, self._words = report, words
        self._due = time.monotonic() + FIRST_WORD

    def to(self, count: int) -> None:
        """The count is `count` now."""
        if time.monotonic() >= self._due:
            self._report(self._words.format(count))
            self._due = time.monotonic() + NEXT_WORD
