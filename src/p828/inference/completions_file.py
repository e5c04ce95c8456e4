"""A JSON Lines file of completions that is there whole or not at all, and whose making goes on after a kill."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from p828.errors import ConfigError, DataError, RunFailed, reason
from p828.files import (
    LOCK_FILE,
    OWNER_FILE,
    locked,
    move_file,
    open_appended,
    open_regular,
    read_limited,
    write_atomic,
)

SUFFIX = ".partial"
LINES_FILE, SETTINGS_FILE = "lines.jsonl", "settings.json"
BEFORE_SETTINGS = {LOCK_FILE, OWNER_FILE, f".{SETTINGS_FILE}.tmp"}  # what a process that was killed early leaves
OWN_FILES = {LINES_FILE, SETTINGS_FILE, *BEFORE_SETTINGS}
MOST_SETTINGS = 2**20  # bytes
PER_SYNC = 1.0  # seconds of lines that a machine's failure may cost; a killed process costs none


class CompletionsFile:
    """The lines so far, in the directory FILE.partial, which becomes FILE when all are there."""

    def __init__(self, directory: Path, lines: BinaryIO, done: int) -> None:
        self.directory, self.done = directory, done
        """Lines that are written."""
        self._lines = lines
        self._synced = time.monotonic()

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line. Raises RunFailed where the disk takes none."""
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._lines.write(line) != len(line):
                raise OSError("no room on the disk")
        except OSError as error:
            raise self._failed(error) from None
        self.done += 1
        if time.monotonic() - self._synced > PER_SYNC:
            self.sync()

    def sync(self) -> None:
        """Have all lines on the disk. Raises RunFailed."""
        try:
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise self._failed(error) from None
        self._synced = time.monotonic()

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(f"{self.directory / LINES_FILE}: cannot be written: {reason(error)}")


@contextmanager
def open_completions(path: Path, settings: Mapping[str, Any], total: int) -> Iterator[CompletionsFile]:
    """The file's lines, for the block to write those of `total` that are missing.

    What a block that did not end wrote is kept, without a line that was cut off, and goes on from there if `settings`
    (JSON) are the same. Raises ConfigError where they are not, where `path` is there already, where FILE.partial is
    another directory, where nothing can be written and while another process writes it; RunFailed where the finished
    file cannot be moved, as to a name that was taken meanwhile.
    """
    if os.path.lexists(path):
        raise ConfigError(f"--output {path}: is there already; a new name is accepted")
    partial = path.with_name(path.name + SUFFIX)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        found = set(os.listdir(partial))
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {reason(error)}") from None
    if SETTINGS_FILE not in found and not found <= BEFORE_SETTINGS:
        raise ConfigError(f"--output {path}: {partial} holds something else, and lines are kept there: move it away")
    with locked(partial, f"--output {path}: another process is writing it"):
        try:
            _check_settings(partial, settings, path)
            done = _whole_lines(partial / LINES_FILE, total)
            lines = open_appended(partial / LINES_FILE)
        except OSError as error:
            raise ConfigError(f"--output {path}: cannot be written: {reason(error)}") from None
        with lines:
            file = CompletionsFile(partial, lines, done)
            try:
                yield file
            finally:
                file.sync()
                if not file.done:
                    _remove(partial)
        try:
            move_file(partial / LINES_FILE, path)
        except OSError as error:
            where = partial / LINES_FILE
            raise RunFailed(f"{path}: cannot be written: {reason(error)}; all lines are in {where}") from None
        _remove(partial)


def _remove(partial: Path) -> None:
    """What is written here, and the directory unless there is something else in it."""
    for name in OWN_FILES:
        (partial / name).unlink(missing_ok=True)
    with suppress(OSError):
        partial.rmdir()


def _check_settings(partial: Path, settings: Mapping[str, Any], path: Path) -> None:
    """Write the settings, or compare them with those that are there. Raises ConfigError and OSError."""
    file = partial / SETTINGS_FILE
    if not os.path.lexists(file):
        write_atomic(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(read_limited(file, MOST_SETTINGS))
        differ = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f"{file}: damaged; remove {partial} to begin anew") from None
    if differ:
        shown = ", ".join(
            f"{name} = {_short(before.get(name))} and not {_short(settings.get(name))}" for name in differ
        )
        raise ConfigError(
            f"--output {path}: {partial} was begun with {shown}\nWith the same it goes on; remove it to begin anew"
        )


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


def _whole_lines(path: Path, total: int) -> int:
    """How many lines there are; what follows the last whole one is cut off. Raises DataError and OSError."""
    if not os.path.lexists(path):
        return 0
    count = size = 0
    with open_regular(path) as raw, open(raw.fileno(), "rb", closefd=False) as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_result(line):
                break
            count, size = count + 1, size + len(line)
        rest = file.read()
    if count > total or rest:
        raise DataError(f"{path}: damaged at line {min(count, total) + 1}; remove {path.parent} to begin anew")
    os.truncate(path, size)
    return count


def _is_result(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
