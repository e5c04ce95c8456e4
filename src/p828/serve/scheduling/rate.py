"""How fast requests are answered."""

from collections import deque

LAST = 64  # requests over which the rate is taken: some seconds of a busy server


class RequestRate:
    """Of requests that leave their slots, measured over the last ones while the decoder was at work.

    Times are those of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=LAST)

    def count(self, now: float) -> None:
        """A request has left its slot."""
        self._ends.append(now)

    def restart(self) -> None:
        """The decoder had nothing to do: what was measured before says nothing of what comes."""
        self._ends.clear()

    def seconds_for(self, requests: int, now: float) -> float | None:
        """In which this many leave their slots; None where fewer than two have, and no rate is known."""
        if len(self._ends) < 2:
            return None
        return requests * (now - self._ends[0]) / (len(self._ends) - 1)
