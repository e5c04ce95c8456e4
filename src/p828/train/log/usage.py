"""What a run has used of time and memory, and how long it will take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

LONG_ENOUGH = 10.0  # seconds that are measured within a step
STEPS = 2  # that are measured otherwise
A_DAY = 24 * 3600.0
UNITS = ((A_DAY, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass
class Usage:
    """Training time and memory of a run. The fields are agreed before each step, so they are the same on all ranks."""

    trained_seconds: float = 0.0
    """Over all starts, until the current step began; the longest of all ranks."""
    rank_memory_bytes: list[int] = field(default_factory=list)
    """The most that each rank has held so far."""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Measure from now on, on top of the seconds of earlier starts."""
        self._started, self._seconds_before = time.monotonic(), self.trained_seconds

    @property
    def memory_bytes(self) -> int:
        """The most that a rank has held so far."""
        return max(self.rank_memory_bytes, default=0)

    @property
    def is_resumed(self) -> bool:
        """Whether the run was trained before this start."""
        return self._seconds_before > 0

    def seconds(self) -> float:
        """Seconds of training so far, over all starts, by this rank's clock."""
        return self._seconds_before + time.monotonic() - self._started


class Pace:
    """Measures steps, or micro-batches of a long step, from the first call on.

    A run whose first step compiles makes that call after it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None  # steps and time
        self._is_reported = False

    def seconds_per_step(self, steps: float) -> float | None:
        """The seconds of a step, once, as soon as they are known; to be called often, with the steps done so far."""
        if self._is_reported:
            return None
        now = self._clock()
        if self._first is None:
            self._first = steps, now
            return None
        done, seconds = steps - self._first[0], now - self._first[1]
        if done < STEPS and (seconds < LONG_ENOUGH or done <= 0):
            return None
        self._is_reported = True
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
