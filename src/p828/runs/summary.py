"""One run in a line: its state, how far it is and how well it goes, from small files and the end of its records.

Nothing here imports PyTorch, verifies a checksum or changes anything, so that thousands of runs are summed up in
seconds, those that train now among them.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from p828.config.files import read_toml
from p828.errors import ConfigError, DataError, P828Error, reason
from p828.files import MEBIBYTE, is_locked, read_limited
from p828.runs import records
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, RECORDS_FILE, STEP_NAME, step_of
from p828.runs.manifest import read_manifest, read_state

T = TypeVar("T")
State = Literal["training", "complete", "paused", "stopped", "failed", "interrupted", "damaged", "imported", "empty"]
READ_BYTES = (2**18, 2**22, 2**26)  # of the end of the records: some 400 steps of a small model; more without a step
LONGEST_WHY = 300  # characters
SPEED_STEPS = 20  # whose median speed is shown
SEVERITIES = ("critical", "warning", "note")
LARGEST_CONFIG = 4 * MEBIBYTE
OF_STEP, RARE = (
    re.compile(rb'"kind": ?"step"'),
    re.compile(rb'"kind": ?"(?:eval|data|finding)"|"event": ?"(?:ended|health_failed)"'),
)
STEPS = re.compile(r"^\[train\]\n(?:(?!\[).*\n)*?steps = (\d{1,18})\n", re.MULTILINE)
HAS_HEALTH = re.compile(r"^\[health\]$", re.MULTILINE)


@dataclass(frozen=True)
class RunSummary:
    """What `p828 runs` shows of a run; None for what is not known."""

    name: str
    state: State
    why: str = ""
    """A sentence on the state, where there is one: why the run failed or stopped, or what of it is damaged."""
    step: int | None = None
    """Optimizer updates made, by the newest record."""
    steps: int | None = None
    """`train.steps`."""
    loss: float | None = None
    """Of the newest step."""
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    """Median of the newest steps."""
    health: str | None = None
    """`ok`, or the severity of the worst finding; None where no rules have watched the run.

    `failed` where the rules failed in its last start, unless they had found something critical.
    """
    finding: str = ""
    """The rule of the worst finding, the newest of them."""
    age_seconds: float | None = None
    """Since the newest record."""
    unread_bytes: int = 0
    """Of `metrics.jsonl`, before the part that was read: findings in there do not count."""

    def to_json(self) -> dict[str, Any]:
        numbers: dict[str, Any] = records.encoded(asdict(self))
        return numbers


def summary(run: Path) -> RunSummary:
    """Sum up a run's directory. Whatever is in it raises nothing: what cannot be read is the state `damaged`."""
    damage: list[str] = []
    text = _noted(damage, lambda: _text_of(run / CONFIG_FILE), "")
    found, unread = _noted(damage, lambda: _newest_records(run / RECORDS_FILE), (list[dict[str, Any]](), 0))
    saved = _noted(damage, lambda: _newest_checkpoint(run / CHECKPOINTS), _Saved())
    steps = _noted(damage, lambda: _steps(text, run), None)
    is_training = _noted(damage, lambda: is_locked(run), False)
    of_steps = [record for record in found if record["kind"] == "step"]
    newest = of_steps[-1] if of_steps else {}
    step = newest["step"] if newest else saved.step
    state, why = _state(found, step, steps, saved, damage)
    evaluations = [record for record in found if record["kind"] == "eval"]
    best_loss, best_step = _best(evaluations, saved.progress)
    validation = evaluations[-1].get("loss") if evaluations else saved.progress.get("validation_loss")
    speeds = [records.number(record.get("tokens_per_second")) for record in of_steps[-SPEED_STEPS:]]
    health, finding = _health(found, bool(HAS_HEALTH.search(text)))
    return RunSummary(
        name=run.name or str(run),
        state="training" if is_training else state,
        why="" if is_training else why,
        step=step,
        steps=steps,
        loss=records.number(newest.get("loss", saved.progress.get("loss"))),
        validation_loss=records.number(validation),
        best_loss=best_loss,
        best_step=best_step,
        tokens_per_second=median(known) if (known := [speed for speed in speeds if speed]) else None,
        health=health,
        finding=finding,
        age_seconds=_age(run),
        unread_bytes=unread,
    )


def _noted(damage: list[str], read: Callable[[], T], otherwise: T) -> T:
    """What `read` returns; else `otherwise`, and a line in `damage`."""
    try:
        return read()
    except (OSError, P828Error, ValueError, RecursionError) as error:
        named = isinstance(error, OSError) and error.filename
        damage.append(f"{error.filename}: {error.strerror}" if named else reason(error))  # type: ignore[union-attr]
        return otherwise


def _state(
    found: Sequence[Mapping[str, Any]], step: int | None, steps: int | None, saved: "_Saved", damage: Sequence[str]
) -> tuple[State, str]:
    """The state of a run that no process trains, and a sentence on it."""
    if damage:
        return "damaged", damage[0]
    of_state = [record for record in found if record["kind"] in ("data", "step") or _is_end(record)]
    if of_state and _is_end(last := of_state[-1]):
        return last["state"], "" if last["state"] == "complete" else str(last.get("why", ""))[:LONGEST_WHY]
    if saved.is_imported:
        return "imported", ""
    if not step:
        return "empty", ""
    if steps is not None and step >= steps:
        return "complete", ""
    if saved.step == step:  # of an earlier version, which recorded no end
        return "paused", ""
    at = f"the newest checkpoint is of step {saved.step:,}" if saved.step else "it has no checkpoint"
    return "interrupted", f"no end is recorded, as of a process that was killed; {at}"


def _is_end(record: Mapping[str, Any]) -> bool:
    return record.get("event") == "ended" and record.get("state") in ("complete", "paused", "stopped", "failed")


def _best(evaluations: Sequence[Mapping[str, Any]], progress: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """The least validation loss that is known, and its step."""
    pairs = [(record.get("loss"), record.get("step")) for record in evaluations]
    found = [
        (loss, at)
        for value, at in [*pairs, (progress.get("best_loss"), progress.get("best_step"))]
        if (loss := records.number(value)) is not None and math.isfinite(loss) and type(at) is int
    ]
    return min(found, default=(None, None))


def _health(found: Sequence[Mapping[str, Any]], is_watched: bool) -> tuple[str | None, str]:
    """The worst severity among the findings, and the newest rule that has it; see `RunSummary.health`."""
    findings = [record for record in found if record["kind"] == "finding" and record.get("severity") in SEVERITIES]
    worst = min((record["severity"] for record in findings), key=SEVERITIES.index, default=None)
    of_rules = [record for record in found if record["kind"] == "data" or record.get("event") == "health_failed"]
    if worst != "critical" and of_rules and of_rules[-1]["kind"] != "data":  # each start has a record of its data
        return "failed", ""
    if worst is None:
        return ("ok" if is_watched else None), ""
    return worst, next(str(record.get("rule")) for record in reversed(findings) if record["severity"] == worst)


def _age(run: Path) -> float | None:
    """Seconds since the newest record, or since the configuration was written."""
    for name in (RECORDS_FILE, CONFIG_FILE, ""):
        with contextlib.suppress(OSError):
            return max(time.time() - (run / name).stat().st_mtime, 0.0)
    return None


def _text_of(path: Path) -> str:
    if not path.exists():
        return ""
    return read_limited(path, LARGEST_CONFIG).decode("utf-8")


def _steps(text: str, run: Path) -> int | None:
    """`train.steps`. A file that p828 wrote is searched for it, any other one is parsed. Raises ConfigError."""
    if not text:
        return None
    if found := STEPS.search(text):
        return int(found[1])
    section = read_toml(run / CONFIG_FILE).get("train", {})
    steps = section.get("steps") if isinstance(section, dict) else None
    return steps if type(steps) is int else None


def _newest_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Of the records at the end those that are shown, in order; and the bytes before them.

    Of steps it is the last ones only, since parsing takes most of the time. Raises ConfigError if there is no record
    among many lines.
    """
    if not path.exists():
        return [], 0
    size = path.stat().st_size
    for most in READ_BYTES:
        lines = records.tail(path, most)
        steps = [number for number, line in enumerate(lines) if OF_STEP.search(line)]
        if size <= most or steps:
            break
    rare = [number for number, line in enumerate(lines) if RARE.search(line)]
    chosen = sorted({*steps[-SPEED_STEPS:], *rare})
    found = [record for number in chosen if (record := records.parsed(lines[number])) is not None]
    if lines and not found and all(records.parsed(line) is None for line in lines[-SPEED_STEPS:]):
        raise ConfigError(f"{path}: no line at its end is a record")
    return found, max(size - most, 0)


@dataclass(frozen=True)
class _Saved:
    """The newest complete checkpoint."""

    step: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    is_imported: bool = False
    """Whether it holds weights only."""


def _newest_checkpoint(directory: Path) -> _Saved:
    """The newest one whose files have their sizes; tensors are not read. Raises DataError if all are damaged."""
    if not directory.exists():
        return _Saved()
    named = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)]
    wrong: Exception | None = None
    for path in sorted(named, key=step_of, reverse=True):
        try:
            files = read_manifest(path)["files"]
            for file, about in files.items():
                if (path / file).stat().st_size != about["size"]:
                    raise DataError(f"{path}: {file} has not the size that was written")
            progress = read_state(path).get("progress")
            is_imported = not any(file.startswith("optimizer") for file in files)
            return _Saved(step_of(path), progress if isinstance(progress, dict) else {}, is_imported)
        except (OSError, P828Error) as error:
            wrong = wrong or error
    if wrong is not None:
        raise DataError(f"no checkpoint is complete: {wrong}")
    return _Saved()
