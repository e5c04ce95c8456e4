"""What the file system of the run's directory can do: rename, lock, sync, and how fast."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from p828.config import Config
from p828.doctor.check import Check
from p828.doctor.room import checkpoint_bytes, existing
from p828.errors import ConfigError
from p828.files import LOCK_FILE, MEBIBYTE, locked
from p828.runs.file_system import try_out

OTHER_PLACE = "give another --runs-dir, on a disk of this machine or a network file system with locks"
WRITTEN = 64 * MEBIBYTE
SLOW_SAVE = 300.0  # seconds for a checkpoint: with three of them an hour, a quarter of the time
IN_MEMORY = ("tmpfs", "ramfs")


def check_run_directory(config: Config | None, directory: Path, gpus: int) -> list[Check]:
    """Try it out, in a new directory beside what is there, which is removed again. `directory` need not exist."""
    place = existing(directory)
    for part in (directory, *directory.parents):
        if os.path.exists(part) and not os.path.isdir(part):
            return [Check("run directory", "failure", f"{part} is a file", OTHER_PLACE)]
    try:
        trial = Path(tempfile.mkdtemp(prefix=".p828-doctor-", dir=place))
    except OSError as error:
        return [Check("run directory", "failure", f"{place}: nothing can be made there: {error.strerror}", OTHER_PLACE)]
    try:
        checks = [_operations(trial, place), _lock(trial, directory)]
        return checks if checks[0].status == "failure" else [*checks, _speed(trial, config, gpus)]
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def file_system_of(path: Path) -> str:
    """The kind of the file system that a path is on, as `ext4`; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    path, found, longest = path.resolve(), "", -1
    for line in lines:
        before, _, behind = line.partition(" - ")
        mounted = Path(before.split()[4].replace("\\040", " "))
        if path.is_relative_to(mounted) and len(mounted.parts) >= longest:
            found, longest = behind.split()[0], len(mounted.parts)
    return found


def _operations(trial: Path, place: Path) -> Check:
    name, kind = "run directory", file_system_of(trial)
    try:
        try_out(trial)
    except ConfigError as error:
        return Check(name, "failure", str(error).replace(str(trial), str(place)), OTHER_PLACE)
    text = f"{place}{f' ({kind})' if kind else ''}: files and directories are made, synced, renamed and removed"
    if kind in IN_MEMORY:
        return Check(
            name, "warning", f"{text}; it is in memory, and gone at the next start of the machine", OTHER_PLACE
        )
    return Check(name, "ok", text)


def _lock(trial: Path, directory: Path) -> Check:
    """Whether a lock keeps a second process out, and whether one is at work on the run now."""
    name = "lock"
    try:
        with locked(trial, "held"):
            try:
                with locked(trial, "held"):
                    return Check(name, "failure", f"{directory}: two processes would hold one lock", OTHER_PLACE)
            except ConfigError:
                pass  # as it should be
        if os.path.isfile(directory / LOCK_FILE):
            with locked(directory, f"{directory}: another p828 train is at work on this run"):
                pass
    except ConfigError as error:
        return Check(name, "warning", str(error), "wait for its end, or give the new run another --name")
    except OSError as error:
        return Check(name, "failure", f"{directory}: cannot be locked: {error.strerror}", OTHER_PLACE)
    return Check(name, "ok", "a second process is kept out of a run")


def _speed(trial: Path, config: Config | None, gpus: int) -> Check:
    """How fast a file reaches the disk, and what that means for a checkpoint."""
    name = "writing"
    count = min(WRITTEN, shutil.disk_usage(trial).free // 4) // MEBIBYTE
    if not count:
        return Check(name, "failure", "no room to try it", "make room, or give another --runs-dir")
    try:
        begun = time.perf_counter()
        with (trial / "written").open("wb", buffering=0) as file:
            block = os.urandom(MEBIBYTE)  # a file system that compresses is not to be taken for a fast one
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
        rate = count * MEBIBYTE / (time.perf_counter() - begun)
    except OSError as error:
        return Check(name, "failure", f"{count} MiB cannot be written: {error.strerror}", "make room")
    text = f"{rate / 1e6:,.0f} MB/s, synced"
    if config is None:
        return Check(name, "ok", text)
    one = checkpoint_bytes(config, gpus > 0) / rate
    text += f": about {one:,.2g} s for a checkpoint, beside the training"
    if one > SLOW_SAVE:
        return Check(name, "warning", text, "raise --checkpoint.every, or give a --runs-dir on a faster disk")
    return Check(name, "ok", text)
