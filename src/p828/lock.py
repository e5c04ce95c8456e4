"""A directory that one process at a time may work in."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p828.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def locked(directory: Path, complaint: str) -> Iterator[None]:
    """Hold the directory's lock, which the system gives back however the process ends.

    Raises UserError with the complaint while another process holds it, and OSError.
    """
    with open(directory / LOCK_FILE, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(complaint) from None
        yield
