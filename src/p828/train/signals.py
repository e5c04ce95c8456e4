"""Graceful shutdown: ending a run, saved, when a signal asks for it; and answering Ctrl-C within long calls."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

T = TypeVar("T")
A_MOMENT = 2.0  # seconds in which a signal may come twice: a terminal that closes sends it, and so does its shell
SHOW_CURSOR = b"\x1b[?25h"  # the progress bar hides it
NO_SIGNAL = 0  # ends the thread


@dataclass
class GracefulShutdown:
    """Whether a signal has asked the run to end, and which."""

    reason: str = ""
    """The signal's name; empty until one came."""
    time: float = 0.0
    """When it came, by the monotonic clock, in seconds."""

    def repeats(self, name: str, now: float) -> bool:
        """Whether a later signal asks for nothing new.

        Of two different ones in a moment the second is the launcher's, which passes on what the terminal has sent to
        all. A terminal that closes sends SIGHUP, and its shell may send it again: a SIGHUP never asks to end at once.
        """
        return name == "SIGHUP" or (name != self.reason and now - self.time < A_MOMENT)


def interruptible(work: Callable[[], T]) -> T:
    """Do the work in a thread and return what it returns, so that Ctrl-C is answered at once.

    Python calls no signal handler while the main thread is inside a call of a library, and one call of a tokenizer may
    take minutes. KeyboardInterrupt leaves the thread behind, which ends with the process.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="p828-work", daemon=True).start()
    return outcome.result()


def end_now(number: int) -> NoReturn:
    """End the process where it is, with the exit code that a shell gives to a signal."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR)
    os._exit(128 + number)


@contextmanager
def graceful_shutdown(
    when_asked: Callable[[], None],
    answer: Callable[[str], None] = lambda text: None,
    words: str = "saving after this step",
) -> Iterator[GracefulShutdown]:
    """In the block, the first SIGINT, SIGTERM or SIGHUP asks the run to end where it can be saved.

    A thread then calls `when_asked`, to cancel what the run may wait for, and `answer` with a line for the user, which
    has `words` on what is done now. The main thread may be inside an operation of minutes, and calls no handler before
    that ends. A second signal ends the process, with a shell's exit code. An ignored SIGHUP stays so, and once asked it
    is, as it may come in ending.
    """
    shutdown = GracefulShutdown()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield shutdown
        return

    def note(number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not shutdown.reason:
            shutdown.time, shutdown.reason = now, name
            when_asked()
            # by a thread of its own: an output that takes nothing must not keep a second signal from being heard
            text = f"{name}: {words}" + ("" if name == "SIGHUP" else "; again to stop now")
            threading.Thread(target=answer, args=(text,), name="p828-answer", daemon=True).start()
        elif not shutdown.repeats(name, now):
            end_now(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    with _heard(numbers, note), _unhandled(numbers, shutdown):
        yield shutdown


@contextmanager
def _heard(numbers: Sequence[int], note: Callable[[int], None]) -> Iterator[None]:
    """In the block, a thread calls `note` with each signal that comes and is one of `numbers`."""
    heard, sent = socket.socketpair()
    sent.setblocking(False)

    def listen() -> None:
        while (number := heard.recv(1)[0]) != NO_SIGNAL:
            if number in numbers:  # other handlers' signals come here, too
                note(number)

    listener = threading.Thread(target=listen, name="p828-signals", daemon=True)
    listener.start()
    wakeup_before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        sent.send(bytes([NO_SIGNAL]))
        listener.join()
        sent.close()
        heard.close()


@contextmanager
def _unhandled(numbers: Sequence[int], shutdown: GracefulShutdown) -> Iterator[None]:
    """In the block, the signals do nothing in the main thread; after it SIGHUP is ignored if any had come."""
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            is_late = number == signal.SIGHUP and shutdown.reason != "" and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if is_late else handler)
