"""Ending a run when it is asked to."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
A_MOMENT = 2.0  # seconds
SHOW_CURSOR = "\x1b[?25h"  # the progress bar hides it


@dataclass
class StopRequest:
    """What has asked the run to end, if anything has."""

    reason: str = ""
    time: float = 0.0


@contextmanager
def noted_signals(when_asked: Callable[[], None]) -> Iterator[StopRequest]:
    """In the block, the first SIGINT or SIGTERM is noted, so that the run ends where it can be saved.

    `when_asked` is called then: for what would keep the run from getting there.

    A second one ends the process at once, with the exit code that a shell gives it. Of two different ones in a moment
    the second is the launcher's, which passes on what the terminal has sent to all.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if request.reason:
            if name != request.reason and now - request.time < A_MOMENT:
                return
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
            os._exit(128 + number)
        request.reason, request.time = name, now
        when_asked()

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
