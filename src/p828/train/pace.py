"""How long a run will take, told once, before hours are spent."""

import time
from collections.abc import Callable

LONG_ENOUGH = 10.0  # seconds that are measured within a step
STEPS = 2  # that are measured otherwise
A_DAY = 24 * 3600.0
UNITS = ((A_DAY, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


class Pace:
    """Measures steps, or micro-batches of a long step, from the first call on.

    A run whose first step compiles makes that call after it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None  # steps and time
        self._is_told = False

    def seconds_per_step(self, steps: float) -> float | None:
        """The seconds of a step, once, as soon as they are known; to be called often, with the steps done so far."""
        if self._is_told:
            return None
        now = self._clock()
        if self._first is None:
            self._first = steps, now
            return None
        done, seconds = steps - self._first[0], now - self._first[1]
        if done < STEPS and (seconds < LONG_ENOUGH or done <= 0):
            return None
        self._is_told = True
        return seconds / done


def how_long(seconds: float, is_rest: bool, device: str, ranks: int) -> str:
    """In words, what a run takes, or the rest of a run that goes on, on its devices, of type `cpu` or `cuda`."""
    what = "the rest of the run takes" if is_rest else "the run takes"
    kind = "CPU" if device == "cpu" else "GPU"
    where = f"this {kind}" if ranks == 1 else f"these {ranks} {kind}s"
    return f"at this rate {what} {in_words(seconds)} on {where}"


def in_words(seconds: float) -> str:
    """`41 days`, `26 hours`, `6 minutes`: at least two of the unit, but for seconds."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 1.95 * size), UNITS[-1])
    count = max(round(seconds / size), 1)
    return f"{count} {unit if count > 1 else unit[:-1]}"
