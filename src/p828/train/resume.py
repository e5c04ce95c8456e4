"""Going on with a run: its directory, whether a new command may go on in it, and its state from a checkpoint."""

import contextlib
import dataclasses
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from p828.config import Config, facts_by_key, facts_of, load, with_vocabulary
from p828.config.facts import Facts
from p828.config.files import refuse_exported
from p828.config.values import flatten, to_dict
from p828.data.order import at_step
from p828.data.retry import Retry
from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError, P828Error, warn
from p828.files import MEBIBYTE, locked, read_limited, write_atomic
from p828.optim.schedule import learning_rate
from p828.runs import checkpoint, file_names, records
from p828.runs.checkpoint_content import config_of, is_weights_only, reading_position, seconds_of
from p828.runs.file_names import (
    CHECKPOINTS,
    CONFIG_FILE,
    QUARANTINED,
    RECORDS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TRACKIO_ID_FILE,
    WANDB_ID_FILE,
)
from p828.runs.file_system import try_out
from p828.runs.train_state import TrainState
from p828.train.checkpointing import Checkpointing

LARGEST_TOKENIZER = 256 * MEBIBYTE
LEFT_BEHIND = re.compile(r"\.[a-z_]+(\.[a-z]+)?\.(tmp|\d+)")  # a file that was being written when a process was killed
A_JUMP = 0.05  # as a fraction of the larger of two learning rates


@dataclass
class RunDirectory:
    path: Path
    versions: dict[str, str]
    """Versions of p828, torch and Python and, if p828's source is under version control, the commit."""
    newest: Path | None
    """The newest complete checkpoint."""
    damaged: list[str]
    """Checkpoints that were quarantined, a line each."""
    changes: list[str]
    """Settings that differ from those of the newest checkpoint, a line each."""
    made: list[Path]
    """Directories that this start made, innermost first; they are removed again if the run cannot begin."""
    vocab_size: int = 0
    """The model's vocabulary in the newest checkpoint; 0 without one."""
    has_trained_tokenizer: bool = False
    """Whether this start has trained the run's tokenizer, which may have taken an hour."""

    def keep(self) -> None:
        """Keep the directory from here on, whatever happens: it holds something of value."""
        self.made, self.has_trained_tokenizer = [], False

    def leave(self, error: P828Error) -> None:
        """After a start that could not begin: remove what it made, or say in the error that its tokenizer is kept."""
        if self.has_trained_tokenizer:
            before = f"{error}. " if "\n" in str(error) else f"{error}\n"  # two lines in all
            kept = f"{self.path / TOKENIZER_FILE}, just trained, is kept: the same command goes on with it"
            error.args = (before + kept,)
        else:
            _remove(self.path, self.made)

    def with_vocabulary(self, config: Config, vocab_size: int) -> Config:
        """The configuration with a `model.vocab_size` of 0 replaced: by the run's own, else from a tokenizer's."""
        if not config.model.vocab_size and self.vocab_size:
            return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=self.vocab_size))
        return with_vocabulary(config, vocab_size)

    def write(self, config: Config) -> None:
        """Write config.toml. Raises ConfigError."""
        try:
            write_config(self.path / CONFIG_FILE, config, self.versions)
        except OSError as error:
            raise ConfigError(f"{error.filename or self.path}: cannot be written: {error.strerror}") from None


@contextmanager
def open_run(config: Config, ranks: ProcessGroup) -> Iterator[RunDirectory]:
    """Make the run's directory, or open the existing one, and lock it against other processes.

    Rank 0 does it and broadcasts what it found. Raises ConfigError when another process trains the run, and when
    its newest checkpoint was made with another model, data, tokenizer or seed; when the file system cannot hold a run;
    and when the run had checkpoints and none of them is left. If it never had one, it is begun anew if settings differ.
    Raises TransientReadError when a checkpoint cannot be read for now. Directories made here are removed again if the
    block raises an error of ours before `keep`, a run's own only if it has no checkpoint and no tokenizer was trained.
    """
    with contextlib.ExitStack() as stack:
        directory = ranks.on_rank_0(lambda: _opened(config, stack))
        try:
            with ranks.raise_together():
                if not (directory.path / CONFIG_FILE).exists():
                    raise ConfigError(
                        f"{directory.path}: {socket.gethostname()} does not see what rank 0 wrote there: "
                        "runs_dir must be on a file system that all hosts share"
                    )
            yield directory
        except P828Error as error:
            if ranks.is_first:
                directory.leave(error)
            raise


def _opened(config: Config, stack: contextlib.ExitStack) -> RunDirectory:
    """The directory, made and locked until the stack is closed. What was made is removed again if it is refused."""
    run_dir, made = config.run_dir, list[Path]()
    refuse_exported(run_dir)  # before a lock is written there
    is_ours = True
    try:
        _make(run_dir, made)
        is_ours = False  # another process may have locked it
        stack.enter_context(locked(run_dir, f"{run_dir}: another p828 train is at work on this run"))
        is_ours = True
        try_out(run_dir)
        _sweep(run_dir)
        newest, damaged, changes, vocab_size = _resume_point(config)
        directory = RunDirectory(run_dir, versions(), newest, damaged, changes, made, vocab_size)
        if newest is None or not (run_dir / CONFIG_FILE).exists():  # else `write`, once the run can go on with it
            write_config(run_dir / CONFIG_FILE, config, directory.versions)
    except (P828Error, OSError) as error:
        if is_ours or isinstance(error, OSError):
            _remove(run_dir, made)
        if isinstance(error, OSError):
            raise ConfigError(f"{run_dir}: cannot be written: {_reason(error, run_dir)}") from None
        raise
    return directory


def _reason(error: OSError, run_dir: Path) -> str:
    """Why the directory cannot be used, with the path that stands in the way if that is another."""
    path = error.filename or str(run_dir)
    return str(error.strerror) if path == str(run_dir) else f"{path}: {error.strerror}"


def _make(directory: Path, made: list[Path]) -> None:
    """Make a directory and its parents. Those that did not exist are added to `made`, innermost first."""
    for path in (*reversed(directory.parents), directory):
        try:
            path.mkdir()
            made.insert(0, path)
        except OSError:
            if not path.is_dir():
                raise


def _sweep(run_dir: Path) -> None:
    """Remove what killed processes left of files that were to take another's place."""
    for path in run_dir.iterdir():
        if LEFT_BEHIND.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def _resume_point(config: Config) -> tuple[Path | None, list[str], list[str], int]:
    """Newest checkpoint, damaged ones, changed settings, the checkpoint's model.vocab_size.

    What stands in the way of beginning anew is removed.
    """
    run_dir = config.run_dir
    checkpoints, retry = run_dir / CHECKPOINTS, Retry(config.data.read_retries, report=warn)
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise ConfigError(f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there")
    if checkpoints.exists():
        if not checkpoints.is_dir():
            raise ConfigError(f"{checkpoints} is a file; the run keeps its checkpoints in a directory of that name")
        try_out(checkpoints)  # it may be a link to another disk
    newest, damaged = checkpoint.find_newest(checkpoints, retry=retry)
    if newest is None:
        _refuse_if_there_were_some(run_dir, damaged)
    before = _before(config, newest, retry)
    changes = _changes(config, before)
    facts = {key: facts_of(facts_by_key(Config), key) for key in changes}
    blocking = [line for key, line in changes.items() if facts[key].is_fixed]
    if blocking and newest is not None:
        raise ConfigError(
            f"{run_dir} was started with other settings: {'; '.join(blocking)}.\n"
            "Set them back to go on with that run, or give this one another --name"
        )
    if newest is None:
        outdated = [RECORDS_FILE, WANDB_ID_FILE, TRACKIO_ID_FILE] if blocking else []
        if any(_decides_tokenizer(key, facts[key]) for key in changes):
            outdated += [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]
        for name in outdated:
            (run_dir / name).unlink(missing_ok=True)
        return None, damaged, [], 0
    _restore_tokenizer(run_dir, newest)
    return newest, damaged, list(changes.values()), before["model.vocab_size"]


def _decides_tokenizer(key: str, facts: Facts) -> bool:
    """Whether the tokenizer of a run that has no checkpoint may depend on the setting."""
    section, _, name = key.partition(".")
    if name.startswith("validation.") and facts.kinds and "held_out" not in facts.kinds:
        return False  # it names text that is never trained on
    is_of_text = section in ("data", "tokenizer") and (facts.is_fixed or bool(facts.decides_tokens))
    return is_of_text or name.endswith("prepared") or key in ("train.seed", "train.init_from")


def _restore_tokenizer(run_dir: Path, newest: Path) -> None:
    """Copy the checkpoint's tokenizer and chat template where the run's own are missing.

    Raises ConfigError if the run has another template. Another tokenizer is found by its fingerprint.
    """
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        if not (newest / name).is_file():
            continue
        content, own = read_limited(newest / name, LARGEST_TOKENIZER), run_dir / name
        if not own.exists():
            write_atomic(own, content.decode())
        elif name == TOKENIZER_CONFIG_FILE and read_limited(own, LARGEST_TOKENIZER) != content:
            raise ConfigError(f"{newest}: trained with another chat template than the run's {own}: remove that file")


def _refuse_if_there_were_some(run_dir: Path, damaged: list[str]) -> None:
    """A run that had checkpoints begins anew only if the user says so, as that overwrites what is left of it."""
    checkpoints = run_dir / CHECKPOINTS
    how = f"To begin again, give another --name or remove {run_dir}"
    if damaged:
        more = f" ({len(damaged) - 1} more are damaged, too)" if len(damaged) > 1 else ""
        raise ConfigError(f"{run_dir} has no complete checkpoint to go on from: {damaged[0]}{more}.\n{how}")
    has_quarantined = checkpoints.is_dir() and any(path.name.startswith(QUARANTINED) for path in checkpoints.iterdir())
    path = run_dir / RECORDS_FILE
    saved = (line["step"] for line in records.read(path) if line.get("event") == "saved") if path.exists() else ()
    last = max(saved, default=None)
    if has_quarantined or last is not None:
        what = "those that are there are damaged" if has_quarantined else f"its records tell of one of step {last}"
        raise ConfigError(f"{checkpoints} has no checkpoint left to go on from, and {what}.\n{how}")


def _before(config: Config, newest: Path | None, retry: Retry) -> dict[str, Any]:
    """The settings of the checkpoint, else of config.toml, by dotted key; none if the run is a new one."""
    path = config.run_dir / CONFIG_FILE
    if newest is not None:
        with checkpoint.opened(newest, names=(), retry=retry) as saved:
            _refuse_weights_only(saved, config.run_dir)
            return flatten(config_of(saved))
    if path.exists():
        return flatten(load(str(path)))
    if any(not entry.name.startswith(".") for entry in config.run_dir.iterdir()):
        raise ConfigError(f"{config.run_dir} is not a run: it holds files but no {CONFIG_FILE}; give another --name")
    return {}


def _refuse_weights_only(saved: checkpoint.OpenCheckpoint, run_dir: Path) -> None:
    """An imported model can be started from and not gone on with. Raises ConfigError for one."""
    if is_weights_only(saved):
        word = shlex.quote(str(run_dir))
        raise ConfigError(
            f"{saved.path} holds weights only, without an optimizer's state to go on with; a new run starts from them: "
            f"p828 train {word} --name NEW --train.init-from {word}"
        )


def _changes(config: Config, before: dict[str, Any]) -> dict[str, str]:
    """`key = before, now after` for every key that differs."""
    if not before:
        return {}
    after = flatten(config)
    if not config.model.vocab_size:  # it follows the tokenizer, as the run's own did
        after["model.vocab_size"] = before["model.vocab_size"]
    if config.tokenizer.name != "train" and before["tokenizer.name"] == config.tokenizer.name:
        after["tokenizer.vocab_size"] = before["tokenizer.vocab_size"]  # of a trained one
    keys = (key for key in {**before, **after} if key not in ("name", "runs_dir"))
    return {
        key: f"{key} = {before.get(key)!r}, now {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)
    }


def _remove(run_dir: Path, made: list[Path]) -> None:
    """Remove the run's directory, if this start made it and it has no checkpoint, and the empty parents made for it."""
    checkpoints = run_dir / CHECKPOINTS
    if run_dir in made and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        shutil.rmtree(run_dir)
    for path in made:
        with contextlib.suppress(OSError):  # kept, or another run was begun in there meanwhile
            path.rmdir()


def write_config(path: Path, config: Config, versions: dict[str, str]) -> None:
    header = "# " + ", ".join(f"{name} {value}" for name, value in versions.items()) + "\n\n"
    write_atomic(path, header + tomli_w.dumps(to_dict(config)))


def versions() -> dict[str, str]:
    """Versions of p828, torch and Python and, if p828's source is under version control, the commit."""
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
    found = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return found.stdout.strip() or None


def resume(path: Path, checkpointing: Checkpointing) -> tuple[TrainState, list[str]]:
    """Put the run's parts where they were when the checkpoint was saved, and return its state.

    Also a line for each change of the steps to come (other rows, or a jump of the learning rate) and for a stage that
    stays on another number of ranks. Raises ConfigError if it was made with another tokenizer, DamagedCheckpoint if its
    content cannot be a run's, and TransientReadError.
    """
    config, loader, ranks, retry = checkpointing.config, checkpointing.loader, checkpointing.ranks, checkpointing.retry
    with ranks.raise_together(), checkpoint.opened(path, retry=retry) as saved:
        if saved.state.get("tokenizer") != checkpointing.fingerprint:
            raise ConfigError(f"{path}: trained with another tokenizer than the run's {TOKENIZER_FILE}")
        if saved.step != file_names.step_of(path):
            raise checkpoint.DamagedCheckpoint(f"{path}: its manifest says step {saved.step}")
        state = checkpointing.read_state(saved)
        with reading_position(path):
            loader.load_state_dict(at_step(saved.state["data"], state.step))
        checkpointing.saved_step = state.step
        checkpointing.usage.trained_seconds = seconds_of(saved)
    checkpointing.load_engine(path)
    before, ranks_before = config_of(saved), saved.state.get("ranks", 1)
    of_ranks = [
        *kept_stage(config, ranks.size, before, ranks_before),
        *changed_rows(config, ranks.size, before, ranks_before),
    ]
    return state, of_ranks + changed_rate(config, state.step, before)


def kept_stage(config: Config, size: int, before: Config, ranks: int) -> list[str]:
    """A line if another number of ranks keeps a stage that was given, or that an older p828 chose without noting it."""
    stages = {(each.engine, each.sharded.stage) for each in (config, before)}
    if stages != {("sharded", config.sharded.stage)} or config.sharded.stage_chosen_for or size in (1, ranks):
        return []
    text = f"ranks = {ranks}, now {size}: sharded.stage = {config.sharded.stage} is kept"
    return [f"{text}; --sharded.stage-chosen-for {ranks} has p828 choose one that fits"]


def changed_rows(config: Config, size: int, before: Config, ranks: int) -> list[str]:
    """A line if the global batch changes because the run is resumed on another number of ranks."""
    rows_before = before.train.micro_batch_size * before.train.gradient_accumulation * ranks
    now = config.train
    rows = now.micro_batch_size * now.gradient_accumulation * size
    if ranks == size or rows == rows_before:
        return []
    accumulation, rest = divmod(rows_before, now.micro_batch_size * size)
    text = f"ranks = {ranks}, now {size}: a step had {rows_before:,} rows, and has {rows:,}"
    return [text + (f"; --train.gradient-accumulation {accumulation} keeps that" if not rest else "")]


def changed_rate(config: Config, step: int, before: Config) -> list[str]:
    """A line if the learning rate jumps after `step`, since the schedule has another length or kind than before.

    `before` is the configuration of the checkpoint of that step. A change of `optimizer.learning_rate` alone is
    what the user wants, and is not reported.
    """
    if step >= config.train.steps:
        return []
    steps, schedule = before.train.steps, before.schedule
    if (steps, schedule) == (config.train.steps, config.schedule):
        return []
    was = learning_rate(
        min(step, steps - 1), steps, before.optimizer.learning_rate, schedule
    )  # after the last step, that step's
    now = learning_rate(step, config.train.steps, config.optimizer.learning_rate, config.schedule)
    # By the schedule alone: the rest is another optimizer.learning_rate.
    as_was = learning_rate(min(step, steps - 1), steps, config.optimizer.learning_rate, schedule)
    if any(abs(now - rate) <= A_JUMP * max(now, rate) for rate in (was, as_was)):
        return []
    text = (
        f"the learning rate jumps: {now:.3g} at step {step + 1}, where the checkpoint's settings give {was:.3g}, since "
        f"{schedule.kind} over train.steps = {steps:,} is now {config.schedule.kind} over {config.train.steps:,}."
    )
    warmup = "" if step >= config.schedule.warmup_steps else " --schedule.warmup-steps 0"
    if was > 0:
        text += (
            f" Without a jump: --schedule.kind constant --optimizer.learning-rate {was:.3g}{warmup}. "
            'A run that may be made longer is better begun with schedule.kind = "constant" or "wsd"'
        )
    return [text]
