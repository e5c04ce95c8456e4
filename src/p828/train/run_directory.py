"""A run's directory: its resolved configuration, and whether a new command may go on in it."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tomli_w

from p828.config import Config, flatten, load, to_dict
from p828.errors import UserError

CONFIG_FILE, TOKENIZER_FILE, CHECKPOINTS = "config.toml", "tokenizer.json", "checkpoints"

# A resumed run must have the same weights' shapes and the same rows in the same order; all else may change on the way.
FIXED = ("model.", "data.", "tokenizer.", "train.seed")
FREE = ("model.attention_backend", "model.dropout", "model.max_position_embeddings", "model.rope_scaling.")


@dataclass
class RunDirectory:
    path: Path
    changes: list[str]
    """Settings that differ from those the run had before, a line each."""
    is_new: bool
    """Made just now, and to be removed again if the run cannot begin."""

    def keep(self) -> None:
        """From here on the directory holds something of value."""
        self.is_new = False


@contextmanager
def open_run(config: Config, has_checkpoint: bool) -> Iterator[RunDirectory]:
    """Make the run's directory or enter the existing one.

    Raises UserError when the run was started with another model, data, tokenizer or seed. A directory without a
    checkpoint is begun anew if these differ. A new one is removed again if the block raises UserError before `keep`.
    """
    run_dir = config.run_dir
    is_new = not run_dir.exists()
    changes = [] if is_new else _changes(run_dir, config)
    blocking = [line for line in changes if line.startswith(FIXED) and not line.startswith(FREE)]
    if blocking and has_checkpoint:
        raise UserError(
            f"{run_dir} was started with other settings: {'; '.join(blocking)}.\n"
            "Set them back to go on with that run, or give this one another --name"
        )
    if blocking:
        for name in (TOKENIZER_FILE, "metrics.jsonl", "wandb_id"):
            (run_dir / name).unlink(missing_ok=True)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(run_dir / CONFIG_FILE, config)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error.strerror}") from None
    directory = RunDirectory(run_dir, changes if has_checkpoint else [], is_new)
    try:
        yield directory
    except UserError:
        if directory.is_new:
            shutil.rmtree(run_dir)
            with contextlib.suppress(OSError):  # other runs are in there
                run_dir.parent.rmdir()
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
    header = "# " + ", ".join(f"{name} {value}" for name, value in versions().items()) + "\n\n"
    temporary.write_text(header + tomli_w.dumps(to_dict(config)), encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """What runs: p828, torch, Python and, if its source is under version control, the commit."""
    found = {"p828": version("p828"), "torch": version("torch"), "Python": sys.version.split()[0]}
    commit = _git_commit()
    return {**found, "git": commit} if commit else found


def _git_commit() -> str | None:
    """The commit of the source that runs; None when it is not in a repository, or in one that does not track it."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).parent)]
    if subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True).returncode:
        return None
    return subprocess.check_output([*git, "describe", "--always", "--dirty", "--abbrev=12"], text=True).strip()
