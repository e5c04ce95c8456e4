"""A run's directory: its resolved configuration, and whether a new command may go on in it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import tomli_w

from p828.config import Config, flatten, load, to_dict
from p828.errors import UserError

CONFIG_FILE, TOKENIZER_FILE, CHECKPOINTS = "config.toml", "tokenizer.json", "checkpoints"

# A resumed run must have the same weights' shapes and the same rows in the same order; all else may change on the way.
FIXED = ("model.", "data.", "tokenizer.", "train.seed")
FREE = ("model.attention_backend", "model.dropout")


@contextmanager
def open_run(config: Config, has_checkpoint: bool) -> Iterator[list[str]]:
    """Make the run's directory or enter the existing one; gives the changed keys, one line each.

    Raises UserError when the run was started with another model, data, tokenizer or seed. A directory without a
    checkpoint is begun anew if these differ. What was made here is removed again if the block raises UserError.
    """
    run_dir = config.run_dir
    is_new, is_first = not run_dir.exists(), not run_dir.parent.exists()
    changes = [] if is_new else _changes(run_dir, config)
    blocking = [line for line in changes if line.startswith(FIXED) and not line.startswith(FREE)]
    if blocking and has_checkpoint:
        raise UserError(
            f"{run_dir} was started with other settings: {'; '.join(blocking)}.\n"
            "Set them back to go on with that run, or give this one another --name"
        )
    if blocking:
        for name in (TOKENIZER_FILE, "metrics.jsonl"):
            (run_dir / name).unlink(missing_ok=True)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(run_dir / CONFIG_FILE, config)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error.strerror}") from None
    try:
        yield changes if has_checkpoint else []
    except UserError:
        if is_new and not (run_dir / CHECKPOINTS).exists():
            shutil.rmtree(run_dir.parent if is_first else run_dir)
        raise


def _changes(run_dir: Path, config: Config) -> list[str]:
    """`key = before, now after` for every key that differs from the run's config.toml."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        if any(run_dir.iterdir()):
            raise UserError(f"{run_dir} is not a run: it holds files but no {CONFIG_FILE}; give another --name")
        return []
    before, after = flatten(load(str(path))), flatten(config)
    differing = (key for key in after if before[key] != after[key] and key not in ("name", "runs_dir"))
    return [f"{key} = {before[key]!r}, now {after[key]!r}" for key in differing]


def _write_config(path: Path, config: Config) -> None:
    temporary = path.with_name(path.name + ".tmp")
    header = f"# p828 {version('p828')}, torch {version('torch')}, Python {sys.version.split()[0]}{_git_commit()}\n\n"
    temporary.write_text(header + tomli_w.dumps(to_dict(config)), encoding="utf-8")
    temporary.replace(path)


def _git_commit() -> str:
    """`, git COMMIT` of the source that runs, or nothing when it is not in a repository."""
    source = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return ""
    found = subprocess.run(
        [git, "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f", git {found.stdout.strip()}" if found.returncode == 0 else ""
