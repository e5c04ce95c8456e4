"""The file system of a run's directory: whether it can do what a run needs, and how much room it has."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from p828.errors import ConfigError
from p828.files import fsync, move_directory, write_atomic
from p828.runs.file_names import TRIAL_DIRECTORY


def try_out(directory: Path) -> None:
    """Make, write, sync, rename and remove small files and directories in it, as a run does later.

    Raises ConfigError naming the first of these that the file system refuses. Leaves nothing behind.
    """
    trial = directory / TRIAL_DIRECTORY
    saving, saved = trial / "saving", trial / "saved"
    steps: list[tuple[str, Callable[[], object]]] = [
        ("make a directory", lambda: saving.mkdir(parents=True)),
        ("write a file and rename it", lambda: write_atomic(saving / "a", "a")),
        ("sync a directory", lambda: fsync(saving)),
        ("rename a directory, nor the files in one", lambda: move_directory(saving, saved)),
        ("replace a file", lambda: write_atomic(saved / "a", "b")),
        ("remove a file", lambda: os.unlink(saved / "a")),
        ("remove a directory", lambda: saved.rmdir()),
    ]
    try:
        if trial.exists():  # left by a killed process
            shutil.rmtree(trial)
        for what, do in steps:
            try:
                do()
            except OSError as error:
                reason = error.strerror or str(error)
                raise ConfigError(
                    f"{directory}: a run cannot be kept there, as its file system does not {what}: {reason}"
                ) from None
    except OSError as error:
        raise ConfigError(f"{trial}: cannot be removed: {error.strerror}") from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def free_bytes(directory: Path) -> int | None:
    """What this user may still write there; None where the file system does not say, as one that is away."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None
