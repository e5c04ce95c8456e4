"""How fast tokens come."""

import time
from dataclasses import dataclass, field


@dataclass
class Speed:
    """Counts tokens as they come, from when it is made; a sum is that of several answers."""

    tokens: int = 0
    answers: int = 0
    """That have a token."""
    first_seconds: float = 0.0
    """Before the first token of each answer, added up."""
    further_seconds: float = 0.0
    """From the first to the last token of each answer, added up."""
    _last: float = field(default_factory=time.perf_counter)

    def note(self) -> None:
        """One more token."""
        now = time.perf_counter()
        if self.tokens:
            self.further_seconds += now - self._last
        else:
            self.answers, self.first_seconds = 1, now - self._last
        self.tokens += 1
        self._last = now

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.first_seconds + other.first_seconds,
            self.further_seconds + other.further_seconds,
        )

    @property
    def rate(self) -> str:
        """Of the tokens behind the first one of each answer."""
        if not self.further_seconds:
            return f"{self.tokens:,} token{'' if self.tokens == 1 else 's'}"
        return f"{(self.tokens - self.answers) / self.further_seconds:,.1f} tokens/s"

    def __str__(self) -> str:
        """Of several answers, with the mean time of their first tokens."""
        if not self.tokens:
            return "no token"
        first = self.first_seconds / self.answers
        shown = f"{first:,.1f} s" if first >= 1 else f"{1000 * first:.0f} ms"
        rate = f", {self.rate}" if self.further_seconds else ""
        return f"{self.tokens:,} token{'' if self.tokens == 1 else 's'}{rate}, first token after {shown}"
