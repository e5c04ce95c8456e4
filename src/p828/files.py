"""Small files, files that are there whole or not at all, and directories for one process at a time.

Only regular files are opened: a FIFO, a device or a socket is refused at once and never waited for. Where p828 writes,
a link in the file's place is refused too, so that nothing outside the directory is touched.
"""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from p828.errors import ConfigError

MEBIBYTE = 2**20
LOCK_FILE = ".lock"
OWNER_FILE = ".lock.owner"  # in its stead, where the file system has no locks
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
UNKNOWN_TO_DIRECTORIES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # syncing, on some network file systems


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
    except OSError as error:
        if error.errno not in UNKNOWN_TO_DIRECTORIES or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def move_directory(source: Path, target: Path, first: str = "", last: str = "") -> None:
    """Rename a directory to a name that is free. Raises OSError.

    Some file systems rename files only. There its files are moved one by one, `first` before and `last` after all
    others, so that a reader who looks for that file takes neither half for the whole.
    """
    try:
        source.rename(target)
        return
    except OSError:
        if not source.is_dir() or target.exists():
            raise
    target.mkdir()
    for name in sorted(os.listdir(source), key=lambda name: (name == last) - (name == first)):
        os.rename(source / name, target / name)
    fsync(target)
    source.rmdir()


@contextmanager
def locked(directory: Path, complaint: str) -> Iterator[None]:
    """Hold the directory's lock, which the system gives back however the process ends.

    Where the file system has no locks, a file that names the process takes its place; what a process of this machine
    left of it when it died is replaced. Raises ConfigError with the complaint while another process holds it, and
    OSError.
    """
    with open_appended(directory / LOCK_FILE) as file:
        has_locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(complaint) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            has_locks = False
        with nullcontext() if has_locks else _owned(directory / OWNER_FILE, complaint):
            yield


@contextmanager
def _owned(path: Path, complaint: str) -> Iterator[None]:
    """Hold what the file stands for, which no other process can make meanwhile."""
    own = json.dumps({**_place(), "pid": os.getpid(), "start": _start_of(os.getpid())}).encode()
    while not _made(path, own):
        try:
            found = read_limited(path, MEBIBYTE)
            if not _is_left_behind(found):
                raise ConfigError(f"{complaint}, as {path} says; if its process is no more, remove that file")
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            os.rename(path, aside)
            if read_limited(aside, MEBIBYTE) == found:
                aside.unlink()
            else:  # another process was faster, and has made its own
                os.rename(aside, path)
        except FileNotFoundError:
            continue
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _made(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _is_left_behind(content: bytes) -> bool:
    """Whether it names a process of this machine, since it was started, that has ended."""
    try:
        owner: Any = json.loads(content)
        pid, start = owner["pid"], owner["start"]
        is_from_here = {name: owner[name] for name in _place()} == _place()
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return is_from_here and type(pid) is int and 0 < pid < 2**31 and _start_of(pid) != start


def _place() -> dict[str, str]:
    """What tells this machine, since it was started, and its table of processes from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "boot": boot, "processes": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"host": socket.gethostname(), "boot": "", "processes": ""}


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None if it has ended, "" where that is not told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else ""
    return None if fields[0] in "ZX" else fields[19]


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
