"""A run as the command line names it: by its directory, or by its name under runs/."""

from pathlib import Path

from p828.config import Config
from p828.config.files import preset_names
from p828.errors import warn
from p828.runs.file_names import CONFIG_FILE, RECORDS_FILE


def run_named(name: str) -> Path:
    """The directory of the run, for a command that takes runs only; `name` as it is where no run has it."""
    return _found(name) or Path(name)


def run_of(name: str, command: str) -> Path | None:
    """The same for a command that takes configurations, too: None where a configuration is meant.

    A preset's name is the preset, and a line on standard error says where a run of that name is.
    """
    if not name or name.endswith(".toml"):
        return None
    if name in preset_names():
        under_runs = Path(Config().runs_dir) / name
        if _has_records(under_runs):
            warn(f"{name} is a preset, taken here; p828 {command} {under_runs} is about the run")
        return None
    return _found(name)


def _found(name: str) -> Path | None:
    return next((path for path in (Path(name), Path(Config().runs_dir) / name) if _has_records(path)), None)


def _has_records(directory: Path) -> bool:
    try:
        return (directory / CONFIG_FILE).is_file() and (directory / RECORDS_FILE).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
