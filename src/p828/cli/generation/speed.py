"""How fast tokens come."""

import time
from dataclasses import dataclass, field

from p828.inference.generate import Piece


@dataclass
class Speed:
    """Counts tokens as they come, from when it is made; a sum is that of several answers.

    A token by which the model ends is no part of the text, and not counted.
    """

    tokens: int = 0
    answers: int = 0
    """That have a token."""
    first_seconds: float = 0.0
    """Before the first token of each answer, added up."""
    further_tokens: int = 0
    """That came with later steps than the first one."""
    further_seconds: float = 0.0
    """In which they came."""
    _last: float = field(default_factory=time.perf_counter)
    _first_step: int = 0

    def note(self, piece: Piece) -> None:
        """One more token."""
        if piece.token.finish_reason == "end":
            return
        now = time.perf_counter()
        if not self.tokens:
            self.answers, self.first_seconds, self._first_step = 1, now - self._last, piece.step
        elif piece.step != self._first_step:
            self.further_tokens += 1
            self.further_seconds += now - self._last
        self.tokens += 1
        self._last = now

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.first_seconds + other.first_seconds,
            self.further_tokens + other.further_tokens,
            self.further_seconds + other.further_seconds,
        )

    @property
    def rate(self) -> str:
        """Of the tokens behind those that came first: empty if there are none."""
        return f"{self.further_tokens / self.further_seconds:,.1f} tokens/s" if self.further_tokens else ""

    def __str__(self) -> str:
        """Of several answers, with the mean time of their first tokens."""
        if not self.tokens:
            return "no token"
        first = self.first_seconds / self.answers
        shown = f"{first:,.1f} s" if first >= 1 else f"{1000 * first:.0f} ms"
        count = f"{self.tokens:,} token{'' if self.tokens == 1 else 's'}"
        return ", ".join(part for part in (count, self.rate, f"first token after {shown}") if part)
