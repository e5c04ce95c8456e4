"""Reading on after a failed read: a file system or a network that is away for a while."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from p828.errors import TransientReadError

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    attempts: int = 0
    """Failures in a row after which there is another attempt, 1, 2, 4, ... seconds later."""
    pause: Callable[[float], object] = time.sleep
    """Called with the seconds to wait."""
    report: Callable[[str], None] = lambda text: None
    """Called with a line before each wait."""

    def call(self, function: Callable[[], T]) -> T:
        """The function's result. Raises what it raises, TransientReadError after the last attempt."""
        failures = 0
        while True:
            try:
                return function()
            except TransientReadError as error:
                self.wait(error, failures)
                failures += 1

    def wait(self, error: TransientReadError, failures: int) -> None:
        """Wait until the next attempt. Raises the error if there is none."""
        if failures == self.attempts:
            raise error
        seconds = 2.0**failures
        self.report(f"{error}; attempt {failures + 2} of {self.attempts + 1} in {seconds:.0f} s")
        self.pause(seconds)


NO_RETRY = Retry()
