"""How fast tokens come."""

import time


class Speed:
    """Counts tokens as they come, from now on."""

    def __init__(self) -> None:
        self.tokens = 0
        self._began = self._first = self._last = time.perf_counter()

    def note(self) -> None:
        """One more token."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens += 1

    def __str__(self) -> str:
        if not self.tokens:
            return "no token"
        count = f"{self.tokens:,} token{'s' if self.tokens > 1 else ''}"
        first = f"{count}, the first after {_short(self._first - self._began)}"
        seconds = self._last - self._first
        return f"{first}, then {(self.tokens - 1) / seconds:,.1f} tokens/s" if seconds > 0 else first


def _short(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
