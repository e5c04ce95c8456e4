"""Small files, files that are there whole or not at all, and directories for one process at a time.

Only regular files are opened: a FIFO, a device or a socket is refused at once and never waited for. Where p828 writes,
a link in the file's place is refused too, so that nothing outside the directory is touched.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from p828.errors import UserError

MEBIBYTE = 2**20
LOCK_FILE = ".lock"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading, unbuffered. Raises OSError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return _checked(descriptor, path, "rb")


def open_appended(path: Path) -> BinaryIO:
    """Open a regular file, made if need be, for appending, unbuffered. Raises OSError for anything else and for links.

    Unbuffered, so that nothing stays behind in a buffer when there is no room on the disk.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link; a regular file is accepted", str(path)) from None
        if error.errno == errno.ENXIO:  # a FIFO or socket that nobody reads
            raise _not_regular(path) from None
        raise
    return _checked(descriptor, path, "ab")


def read_limited(path: Path, most: int) -> bytes:
    """A file's content. Raises OSError, and ValueError if it has more than `most` bytes; then no more are read."""
    content = bytearray()
    with open_regular(path) as file:
        while len(content) <= most and (data := file.read(MEBIBYTE)):
            content += data
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return bytes(content)


def write_atomic(path: Path, text: str) -> None:
    """Put UTF-8 text in place of what the file held, in one step. Raises OSError, leaving the file as it was.

    A link in the file's place is replaced and not followed.
    """
    beside = path.with_name(f".{path.name}.tmp")  # what a killed process left of it is overwritten
    try:
        beside.unlink(missing_ok=True)
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path, complaint: str) -> Iterator[None]:
    """Hold the directory's lock, which the system gives back however the process ends.

    Raises UserError with the complaint while another process holds it, and OSError.
    """
    with open_appended(directory / LOCK_FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(complaint) from None
        yield


def _checked(descriptor: int, path: Path, mode: str) -> BinaryIO:
    """A file object of the descriptor. Raises OSError if it is not a regular file's."""
    try:
        mode_bits = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode_bits):
            raise IsADirectoryError(errno.EISDIR, "is a directory; a regular file is accepted", str(path))
        if not stat.S_ISREG(mode_bits):
            raise _not_regular(path)
        os.set_blocking(descriptor, True)
        return open(descriptor, mode, buffering=0)  # type: ignore[return-value]
    except BaseException:
        os.close(descriptor)
        raise


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))
