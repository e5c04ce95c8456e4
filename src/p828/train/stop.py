"""Ending a run when it is asked to."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # the progress bar hides it


@dataclass
class StopRequest:
    """What has asked the run to end, if anything has."""

    reason: str = ""


@contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """In the block, the first SIGINT or SIGTERM is noted, so that the run ends where it can be saved.

    A second one ends the process at once, with the exit code that a shell gives it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.reason:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
            os._exit(128 + number)
        request.reason = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
