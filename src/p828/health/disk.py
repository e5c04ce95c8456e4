"""What a run has left on the disk besides its records: checkpoints, a report on a hang, a lock."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from p828.files import is_locked, read_limited
from p828.runs.file_names import (
    CHECKPOINTS,
    DELETED,
    HANG_FILE,
    MANIFEST_FILE,
    QUARANTINED,
    RECORDS_FILE,
    REPLACED,
    SAVING,
    STEP_NAME,
    step_of,
)

LARGEST_MANIFEST = 64 * 2**20  # bytes
LONGEST_REPORT = 2**20  # bytes that are read of a report on a hang


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it lies on the disk."""

    step: int
    bytes: int
    problem: str
    """What is missing or has another size than its manifest says; empty if nothing."""


@dataclass(frozen=True)
class Disk:
    checkpoints: tuple[Saved, ...] = ()
    """By step."""
    unfinished: tuple[str, ...] = ()
    """Names of checkpoints that a process had begun to write or to replace, if none is at work now."""
    quarantined: tuple[str, ...] = ()
    """Names of checkpoints that were found damaged and set aside."""
    hang: str = ""
    """The first line of the report on a hang; empty if there is none of the last start."""
    is_locked: bool = False
    """Whether a process holds the run's lock: the run is at work."""
    silent_seconds: float | None = None
    """Time since the last record was written; None without records."""
    free_bytes: int | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """Of the largest one; 0 without one."""
        return max((saved.bytes for saved in self.checkpoints), default=0)


def look(run: Path, now: float | None = None) -> Disk:
    """What the run's directory holds. `now` is the time in seconds since the epoch. Raises OSError."""
    now = time.time() if now is None else now
    directory, records = run / CHECKPOINTS, run / RECORDS_FILE
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    written = records.stat().st_mtime if records.is_file() else None
    locked = is_locked(run)
    return Disk(
        checkpoints=tuple(
            saved for name in names if STEP_NAME.fullmatch(name) and (saved := _saved(directory / name)) is not None
        ),
        unfinished=tuple(name for name in names if name.startswith(".") and _ends_so(name) and not locked),
        quarantined=tuple(name for name in names if name.startswith(QUARANTINED)),
        hang=_hang(run / HANG_FILE, written),
        is_locked=locked,
        silent_seconds=None if written is None else now - written,
        free_bytes=shutil.disk_usage(run).free,
    )


def _ends_so(name: str) -> bool:
    return name.rpartition(".")[2] in (SAVING, REPLACED, DELETED)


def _saved(path: Path) -> Saved | None:
    """A checkpoint's size, and what its manifest does not find; None if it was deleted meanwhile.

    The tensors are not read.
    """
    saved = _measured(path)
    return saved if path.is_dir() else None


def _measured(path: Path) -> Saved:
    step, problem, total = step_of(path), "", 0
    try:
        files = json.loads(read_limited(path / MANIFEST_FILE, LARGEST_MANIFEST))["files"]
        sizes = {str(name): int(about["size"]) for name, about in files.items()}
    except OSError as error:
        return Saved(step, 0, f"{path.name}: {MANIFEST_FILE}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Saved(step, 0, f"{path.name}: {MANIFEST_FILE} is not what was written")
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            problem = problem or f"{path.name}: {name}: {error.strerror}"
            continue
        total += found
        if found != size:
            problem = problem or f"{path.name}: {name} has {found:,} bytes of {size:,}"
    return Saved(step, total, problem)


def _hang(path: Path, written: float | None) -> str:
    """The first line of the report, if no record was written after it."""
    try:
        if written is not None and path.stat().st_mtime < written:
            return ""
        with path.open("rb") as file:
            text = file.read(LONGEST_REPORT)
    except FileNotFoundError:
        return ""
    return next((line for line in text.decode("utf-8", "replace").splitlines() if line.strip()), "")
