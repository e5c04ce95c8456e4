"""The runs of a directory."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from p828.config.files import HUB_FILE
from p828.errors import ConfigError
from p828.files import directory_near
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, RECORDS_FILE
from p828.runs.summary import RunSummary, summary

PARTS = (CONFIG_FILE, RECORDS_FILE, CHECKPOINTS)  # a directory with one of them is a run


@dataclass(frozen=True)
class Listing:
    runs: list[RunSummary]
    """The one with the newest record first."""
    others: list[str]
    """Names of what lies beside them and is no run, hidden entries left out."""


def list_runs(directory: Path, report: Callable[[int, int], None] = lambda done, of: None) -> Listing:
    """Sum up every run in a directory, or the one that it is. `report` is called after each.

    Raises ConfigError if the directory is none or cannot be read; not for what lies in it.
    """
    if is_run(directory):
        return Listing([summary(directory.absolute())], [])
    runs, others = _entries(directory)
    found = []
    for number, run in enumerate(runs, start=1):
        found.append(summary(run))
        report(number, len(runs))
    return Listing(sorted(found, key=lambda run: (run.age_seconds or 0.0, run.name)), others)


def is_run(path: Path) -> bool:
    """Whether a directory holds what a run's does, and is no model in the hub's layout."""
    return any(_is_there(path / part) for part in PARTS) and not _is_there(path / HUB_FILE)


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _entries(directory: Path) -> tuple[list[Path], list[str]]:
    try:
        with os.scandir(directory) as entries:
            named = sorted((entry.name, _is_directory(entry)) for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        advice = directory_near(directory) or "a directory of runs is accepted, as runs_dir of their configuration"
        raise ConfigError(f"{directory}: no such directory; {advice}") from None
    except NotADirectoryError:
        raise ConfigError(f"{directory}: is a file; a directory of runs is accepted") from None
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from None
    runs = [name for name, is_directory in named if is_directory and is_run(directory / name)]
    others = sorted({name for name, _ in named} - set(runs))
    closed = [
        name for name, is_directory in named if is_directory and not os.access(directory / name, os.R_OK | os.X_OK)
    ]
    shown = [f"{name} (no permission to read it)" if name in closed else name for name in others]
    return [directory / name for name in runs], shown


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
