"""Opening regular files only, reading small ones, writing files and directories atomically, and locking directories.

A FIFO, a device or a socket in a file's place is refused at once and never waited for. Where p828 writes, a link in the
file's place is refused or replaced, so that nothing outside the directory is touched.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from p828.errors import ConfigError, nearest

MEBIBYTE = 2**20
LOCK_FILE = ".lock"
OWNER_FILE = ".lock.owner"  # takes its place where the file system has no locks
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
UNKNOWN_TO_DIRECTORIES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems sync files only

MOST_LISTED = 10_000  # entries of a directory that are compared with a name


def directory_near(path: Path) -> str:
    """`did you mean X?` of a directory beside a path that is none, where one is named nearly so; else empty."""
    try:
        with os.scandir(path.parent) as found:
            names = [entry.name for entry in islice(found, MOST_LISTED) if entry.is_dir()]
    except (OSError, ValueError):  # no such place, or a name that no file can have
        return ""
    near = nearest(path.name, names, cutoff=0.7)  # these names are anything, not a list to choose from
    return f"did you mean {path.parent / near}?" if near else ""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading, unbuffered. Raises OSError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return _checked(descriptor, path, "rb")


def open_appended(path: Path) -> BinaryIO:
    """Open a regular file for appending and create it if it is missing. Raises OSError for anything else and for links.

    The file is unbuffered, so that no bytes stay in a buffer when the disk has no room.
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
    """A file's content. Raises OSError, and ValueError once more than `most` bytes are read."""
    content = bytearray()
    with open_regular(path) as file:
        while len(content) <= most and (data := file.read(MEBIBYTE)):
            content += data
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return bytes(content)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content by UTF-8 text in one step, durably. Raises OSError and then leaves the file as it was.

    A link in the file's place is replaced and not followed.
    """
    beside = path.with_name(f".{path.name}.tmp")  # one that a killed process left is removed first
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
    """Write a file's bytes, or a directory's names, to the disk. Raises OSError.

    On file systems that cannot sync directories, a directory is passed over.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_DIRECTORIES or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def move_directory(source: Path, target: Path, first: str = "", last: str = "") -> None:
    """Rename a directory to a name that is not taken. Raises OSError.

    Some file systems rename files only. There the files are moved one by one, `first` before and `last` after all
    others: a reader who looks for that file never takes a directory that is half moved for a whole one.
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


def move_file(source: Path, target: Path) -> None:
    """Rename a file to a name that is not taken, durably. Raises OSError, as FileExistsError for one that is.

    The name is taken by a hard link, which replaces nothing. Where the file system has none, the name is looked at
    before the file is renamed.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(source, target)
    fsync(target.absolute().parent)
    source.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that is there whole or not at all: filled in the block under another name, then renamed.

    An error of the block, Ctrl-C too, leaves nothing. What a killed process left under the other name is removed first.
    Raises ConfigError unless `path` is missing or an empty directory, where none can be made, and while another process
    fills it; OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "there is something in it" if path.is_dir() else "it is a file"
        raise ConfigError(f"{path}: {found}; a new directory is accepted, or an empty one")
    with _filling(path) as filling:
        yield filling
        for name in (LOCK_FILE, OWNER_FILE):
            (filling / name).unlink(missing_ok=True)
        fsync(filling)
        if path.exists():
            path.rmdir()
        move_directory(filling, path)
        fsync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that is there whole or not at all: the block writes one of another name, which is then renamed.

    An error of the block, Ctrl-C too, leaves nothing. What a killed process left is removed first. Raises ConfigError
    where there is something already, where no directory can be made for it, and while another process writes it;
    OSError.
    """
    with _filling(path) as filling:
        if os.path.lexists(path):
            raise ConfigError(f"{path}: is there already; a new name is accepted")
        yield filling / path.name
        fsync(filling / path.name)
        os.replace(filling / path.name, path)
        shutil.rmtree(filling)
        fsync(path.parent)


@contextmanager
def _filling(path: Path) -> Iterator[Path]:
    """A locked directory beside `path` for what will be renamed to it, with nothing in it that a killed process left.

    An error of the block removes it, and the parents that were made for it. Raises ConfigError as `new_directory`.
    """
    filling = path.with_name(f".{path.name}.tmp")
    parents = [parent for parent in path.parents if not os.path.exists(parent)]  # from the innermost on
    try:
        filling.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(parents)
        what = "" if error.filename == str(filling) else f"{error.filename} "
        raise ConfigError(f"{path}: {what}cannot be made: {error.strerror}") from None
    with locked(filling, f"{path}: another process is writing it"):
        try:
            for entry in filling.iterdir():
                if entry.name not in (LOCK_FILE, OWNER_FILE):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            yield filling
        except BaseException:
            shutil.rmtree(filling, ignore_errors=True)
            _remove_empty(parents)
            raise


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # something else is in there by now, or it was not made
            directory.rmdir()


@contextmanager
def locked(directory: Path, complaint: str) -> Iterator[None]:
    """Hold the directory's lock, which the system releases however the process ends.

    Where the file system has no locks, a file that names the owning process takes its place; one whose process on this
    machine has ended is replaced. Raises ConfigError with the text `complaint` while another process holds the lock,
    and OSError.
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


def is_locked(directory: Path) -> bool:
    """Whether a process holds the directory's lock. It is looked at for a moment, and nothing is written.

    Raises OSError where the lock's file cannot be read.
    """
    try:
        with open_regular(directory / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    try:
        return not _is_left_behind(read_limited(directory / OWNER_FILE, MEBIBYTE))
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def _owned(path: Path, complaint: str) -> Iterator[None]:
    """Hold the lock by a file that names this process. Raises ConfigError while another process holds it."""
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
            else:  # another process was faster and has put its own there
                os.rename(aside, path)
        except FileNotFoundError:
            continue
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _made(path: Path, content: bytes) -> bool:
    """Whether the file could be created, which only one process can do."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _is_left_behind(content: bytes) -> bool:
    """Whether the file names a process that ended, of this machine and not of before its last start."""
    try:
        owner: Any = json.loads(content)
        pid, start = owner["pid"], owner["start"]
        is_from_here = {name: owner[name] for name in _place()} == _place()
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return is_from_here and type(pid) is int and 0 < pid < 2**31 and _start_of(pid) != start


def _place() -> dict[str, str]:
    """This machine, its last start and its table of processes: within them, a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "boot": boot, "processes": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"host": socket.gethostname(), "boot": "", "processes": ""}


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if it has ended, "" if the system does not tell."""
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


def shown_bytes(count: float) -> str:
    """`512 bytes`, `64.0 MB`, `1,234.5 GB`."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= divisor:
            return f"{count / divisor:,.1f} {unit}"
    return f"{count:,.0f} bytes"
