"""Two runs side by side: what differs in their settings, their data and their curves.

`compare` asks whether two runs are equal to the bit; this is for runs that are meant to differ. Nothing here imports
PyTorch or reads weights.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from p828.config import Config
from p828.config.files import read_toml
from p828.config.old_names import renamed
from p828.config.values import flatten
from p828.errors import ConfigError, P828Error
from p828.files import directory_near, open_regular
from p828.runs import records
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, RECORDS_FILE, STEP_NAME, step_of
from p828.runs.manifest import read_state

OF_A_STEP = ("tokens", "loss", "rows", "grad_norm", "tokens_per_second", "memory_bytes", "seconds", "epoch")
SMOOTHED = 20  # steps over whose mean losses are compared
APART = 0.05  # nats between these means from which two curves are told to part
POINTS = 4  # of a curve that are shown
FIRST_STEPS = 10  # left out of the speed: they compile and warm up
MOST_STEPS = 2**53
LONGEST_HEADER = 1000  # bytes
ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """A value that two runs have, each its own."""

    name: str
    first: Any
    second: Any
    default: Any = None
    """Of a setting, in this version."""


@dataclass(frozen=True)
class Point:
    """Both curves at one place."""

    at: int
    """A step, or a number of tokens."""
    first: float
    second: float


@dataclass(frozen=True)
class Curves:
    """How the losses of two runs compare; None for what cannot be said."""

    last_step: int
    """The last that both have."""
    first_unequal_step: int | None
    """The first step with other losses."""
    apart_from_step: int | None
    """The first step at which the means of 20 steps are `APART` nats apart."""
    by_step: list[Point]
    """Losses at the same steps, each a mean of up to 20 steps of both up to there."""
    by_tokens: list[Point]
    """Losses at the same number of tokens, likewise; empty where steps have the same tokens in both."""
    validation: list[Point]
    """Validation losses at the last steps at which both were evaluated."""


@dataclass(frozen=True)
class Comparison:
    settings: list[Difference]
    versions: list[Difference]
    data: list[Difference]
    """What is read, by fingerprints, and how much: only what differs."""
    same_data: list[str]
    """Names of the fingerprints that are equal."""
    first_other_rows: int | None
    """The first step of both that was trained on other rows; None if there is none."""
    rows_compared: int
    """Steps whose rows could be compared."""
    curves: Curves | None
    """None where one of them has no step."""
    speed: list[Difference]

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = records.encoded(asdict(self))
        return values


@dataclass(frozen=True)
class _Run:
    """What is read of a run."""

    settings: dict[str, Any]
    versions: dict[str, str]
    state: dict[str, Any]
    """Of the newest checkpoint that can be read."""
    steps: dict[str, list[Any]]
    evaluations: dict[int, float]
    sources: Any
    """Of the newest `data` record: name and tokens of each."""

    @classmethod
    def read(cls, run: Path) -> "_Run":
        """Raises ConfigError for what is no run, or has neither settings nor records that can be read."""
        if not run.is_dir():
            raise ConfigError(
                f"{run}: no such directory; {directory_near(run) or 'the directory of a run is accepted'}"
            )
        path, state = run / RECORDS_FILE, newest_state(run / CHECKPOINTS)
        if not (run / CONFIG_FILE).is_file() and not state and not path.is_file():
            raise ConfigError(f"{run}: no run: it holds no {CONFIG_FILE}, no checkpoint and no {RECORDS_FILE}")
        given = _table(state, "config")
        if (run / CONFIG_FILE).is_file():
            given = read_toml(run / CONFIG_FILE)
        settings = flat(renamed(Config, given, str(run))[0])
        is_recorded = path.is_file()
        steps = records.columns(path, "step", OF_A_STEP) if is_recorded else {"step": []}
        evaluations = records.columns(path, "eval", ("loss",)) if is_recorded else {"step": [], "loss": []}
        sources = records.columns(path, "data", ("sources",)) if is_recorded else {"sources": []}
        return cls(
            settings,
            _versions(run / CONFIG_FILE) or _table(state, "versions"),
            state,
            _sound(steps),
            {at: loss for at, loss in zip(*_sound(evaluations).values(), strict=True) if loss is not None},
            (sources["sources"] or [[]])[-1],
        )


def _sound(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Without records of impossible steps; None in place of a value that is none of its key."""
    kept = [number for number, step in enumerate(columns["step"]) if 0 < step < MOST_STEPS]
    found: dict[str, list[Any]] = {key: [records.number(values[i]) for i in kept] for key, values in columns.items()}
    found["step"] = [columns["step"][i] for i in kept]
    if "rows" in columns:
        found["rows"] = [rows if isinstance(rows := columns["rows"][i], str) else None for i in kept]
    return found


def side_by_side(first: Path, second: Path) -> Comparison:
    """Compare two runs, of which each may be at work, damaged in part, or of an earlier version.

    Raises ConfigError for what is no run, and for a file of settings that cannot be read.
    """
    ours, theirs = _Run.read(first), _Run.read(second)
    prints = [fingerprints(run.state) for run in (ours, theirs)]
    names = [name for name in prints[0] if name in prints[1]]
    amounts = _differences(_amounts(ours), _amounts(theirs))
    rows, compared = _first_other_rows(ours.steps, theirs.steps)
    return Comparison(
        settings=_other_settings(ours.settings, theirs.settings),
        versions=_differences(ours.versions, theirs.versions),
        data=[*_differences(*prints), *amounts],
        same_data=[name for name in names if prints[0][name] == prints[1][name]],
        first_other_rows=rows,
        rows_compared=compared,
        curves=_curves(ours, theirs) if ours.steps["step"] and theirs.steps["step"] else None,
        speed=_differences(_speed(ours.steps), _speed(theirs.steps)),
    )


def _other_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Settings in which they differ. A key that one of them lacks, as of an earlier version, has its default there."""
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(Config()).items()}
    keys = [key for key in {**defaults, **ours, **theirs} if key not in ("name", "runs_dir")]
    found = [
        Difference(key, ours.get(key, default), theirs.get(key, default), defaults.get(key))
        for key in keys
        for default in [defaults.get(key, ABSENT)]
    ]
    return [one for one in found if one.first != one.second]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, ours.get(name), theirs.get(name))
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def fingerprints(state: Mapping[str, Any]) -> dict[str, str]:
    """Of the tokenizer and of every source's data, as the newest checkpoint knows them; hexadecimal."""
    found = {}
    if isinstance(state.get("tokenizer"), str):
        found["tokenizer"] = state["tokenizer"][:12]
    position = state.get("data")
    sources = position.get("sources", []) if isinstance(position, dict) else []
    sources = sources if isinstance(sources, list) else []
    for number, source in enumerate(sources, start=1):
        name = "data" if len(sources) == 1 else f"data of source {number}"
        try:
            if "prepared" in source:
                found[name] = str(source["prepared"])[:12]
            else:
                streams = [stream["rows"]["packer"]["stream"] for stream in source["streams"]]
                files = [stream.get("shards", stream.get("source")) for stream in streams]
                found[name] = hashlib.blake2b(json.dumps(files).encode(), digest_size=6).hexdigest()
        except (LookupError, TypeError, AttributeError):  # a damaged position says nothing
            continue
    return found


def _amounts(run: _Run) -> dict[str, Any]:
    """How much it was trained on, and how much there is."""
    found: dict[str, Any] = {}
    for key, name in (("tokens", "tokens trained on"), ("epoch", "epoch, from 0")):
        known = [value for value in run.steps.get(key, []) if value is not None and math.isfinite(value)]
        if known:
            found[name] = int(known[-1])
    for source in run.sources if isinstance(run.sources, list) else []:
        if isinstance(source, dict):
            found[f"tokens of {source.get('name')}"] = source.get("tokens")
    return found


def _first_other_rows(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[int | None, int]:
    """The first step of both with other rows, and how many steps were compared."""
    mine = {step: rows for step, rows in zip(ours["step"], ours.get("rows", ()), strict=False) if rows}
    others = {step: rows for step, rows in zip(theirs["step"], theirs.get("rows", ()), strict=False) if rows}
    both = sorted(mine.keys() & others.keys())
    other = next((int(step) for step in both if mine[step] != others[step]), None)
    return other, len(both)


def _curves(ours: _Run, theirs: _Run) -> Curves:
    (steps, losses, tokens), (other_steps, other_losses, other_tokens) = map(_curve, (ours.steps, theirs.steps))
    both, at, there = np.intersect1d(steps, other_steps, return_indices=True)
    unequal = both[~((losses[at] == other_losses[there]) | (np.isnan(losses[at]) & np.isnan(other_losses[there])))]
    smooth, other_smooth = _means(losses[at]), _means(other_losses[there])  # a step that one lacks is in neither
    far = np.abs(smooth - other_smooth) > APART
    points = [int(i) for i in np.unique(np.linspace(0, len(both) - 1, POINTS + 1).round())] if len(both) else []
    by_step = [Point(int(both[i]), float(smooth[i]), float(other_smooth[i])) for i in points]
    evaluated = sorted(ours.evaluations.keys() & theirs.evaluations.keys())[-POINTS:]
    return Curves(
        last_step=int(both[-1]) if len(both) else 0,
        first_unequal_step=int(unequal[0]) if len(unequal) else None,
        apart_from_step=int(both[far][0]) if far.any() else None,
        by_step=by_step,
        by_tokens=[]
        if np.array_equal(tokens[at], other_tokens[there])
        else _by_tokens((tokens, _means(losses)), (other_tokens, _means(other_losses))),
        validation=[Point(step, ours.evaluations[step], theirs.evaluations[step]) for step in evaluated],
    )


def _curve(steps: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Steps, losses and tokens of a run, as arrays."""
    losses = np.array([math.nan if loss is None else loss for loss in steps["loss"]], dtype=float)
    tokens = np.array([0 if count is None else count for count in steps["tokens"]], dtype=float)
    return np.array(steps["step"], dtype=np.int64), losses, tokens


def _by_tokens(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> list[Point]:
    """The losses at equal parts of the tokens that both have seen."""
    counts = [float(tokens[-1]) for tokens, _ in (ours, theirs)]
    last = int(min(counts)) if all(map(math.isfinite, counts)) else 0
    found = []
    for part in range(1, POINTS + 1):
        at = last * part // POINTS
        values = [float(losses[min(np.searchsorted(tokens, at), len(losses) - 1)]) for tokens, losses in (ours, theirs)]
        found.append(Point(at, *values))
    return found


def _means(losses: Any) -> Any:
    """At each step the mean of the last `SMOOTHED` losses that are finite, or of fewer at the beginning."""
    is_finite = np.isfinite(losses)
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(ends - SMOOTHED, 0)
    sums, counts = (np.concatenate([[0.0], np.cumsum(of)]) for of in (np.where(is_finite, losses, 0.0), is_finite))
    with np.errstate(invalid="ignore"):  # of no finite loss the mean is NaN
        return (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])


def _speed(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Median speed after the first steps, greatest memory, and the time of all steps."""
    found: dict[str, Any] = {}
    speeds = _known(steps.get("tokens_per_second", ()))
    if speeds:
        found["tokens per second"] = round(median(speeds[FIRST_STEPS:] or speeds))
    if memory := _known(steps.get("memory_bytes", ())):
        found["peak memory, MB"] = round(max(memory) / 1e6)
    if seconds := _known(steps.get("seconds", ())):
        found["hours in steps"] = round(sum(seconds) / 3600, 3)
    return found


def _known(values: Sequence[Any]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of nested tables; `key[0].inner` in a list of tables."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                found |= flat(item, f"{prefix}{name}[{number}].")
        else:
            found[prefix + name] = value
    return found


def _versions(path: Path) -> dict[str, str]:
    """From the first line of config.toml, `# p828 0.1.0, torch 2.11.0, ...`; none in another file."""
    try:
        with open_regular(path) as file:
            line = file.read(LONGEST_HEADER).decode("utf-8", "replace").partition("\n")[0]
    except OSError:
        return {}
    pairs = [part.strip().partition(" ") for part in line.removeprefix("#").split(",")]
    return {name: value for name, _, value in pairs if value} if line.startswith("# p828 ") else {}


def _table(state: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table in a checkpoint's state; empty where it has none."""
    value = state.get(key)
    return value if isinstance(value, dict) else {}


def newest_state(directory: Path) -> dict[str, Any]:
    """Of the newest checkpoint that can be read; empty without one."""
    named = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)] if directory.is_dir() else []
    for path in sorted(named, key=step_of, reverse=True):
        try:
            return read_state(path)
        except P828Error:  # damaged, or deleted by the run meanwhile; an older one says the same of its data
            continue
    return {}
