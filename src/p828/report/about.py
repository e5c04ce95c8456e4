"""What a run was: its settings, the command that trains it, versions, machine, and what the planner says of it."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p828.config import Config, with_steps
from p828.config.files import read_toml
from p828.config.old_names import renamed
from p828.config.values import flatten
from p828.errors import P828Error
from p828.files import MEBIBYTE, read_limited
from p828.plan.plan import Machine, make_plan
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, LOG_FILE
from p828.runs.side_by_side import fingerprints, flat, newest_state
from p828.system.cards import card_of_device

LONGEST_LOG = 4 * MEBIBYTE  # of which the first lines are read; a longer one is left out
DEVICE = re.compile(r"^.{19}   device +(\S.*)$", re.MULTILINE)
RANKS = re.compile(r"^(\d+) x ")
PLACES = ("name", "runs_dir")  # settings that make no other run
EMPTY = np.empty(0, np.float32)
FIRST_STEPS = 10  # left out of the speed: they compile and warm up


def settings(run: Path) -> dict[str, str]:
    """Dotted key to value of the run's `config.toml`, as texts, and this version's default of a key that it lacks.

    Empty for one that cannot be read. A key that has another name now has that name.
    """
    try:
        given = flat(renamed(Config, read_toml(run / CONFIG_FILE), str(run))[0])
    except P828Error:  # which the page tells as the run's problem
        return {}
    defaults = {key: value for key, value in flatten(Config()).items() if key not in given}
    return {key: _text(value) for key, value in {**given, **defaults}.items() if key not in PLACES}


def about(run: Path, started: Mapping[str, Any]) -> dict[str, str]:
    """Name to text: command, versions with the commit, machine and fingerprints, as far as the run's files tell.

    `started` is the record of the run's last start; empty in a run of a version that recorded none.
    """
    again = f"p828 train {shlex.quote(str(run / CONFIG_FILE))}"
    found = {
        "command": str(started.get("command") or f"not recorded; {again} trains the same"),
        "started in": str(started.get("directory", "")),
        "run": str(run),
        "versions": _versions(started.get("versions")) or _first_line(run / CONFIG_FILE),
        "device": device(run, started),
        "machine": str(started.get("machine", "")),
    }
    prints = fingerprints(newest_state(run / CHECKPOINTS))
    return {name: text for name, text in found.items() if text} | {
        f"{name}, fingerprint": text for name, text in prints.items()
    }


def planned(config: Config | None, device: str, found: Mapping[str, float]) -> tuple[list[dict[str, str]], str]:
    """Rows of what was planned and what came, and a remark: for what it was planned, or why there is no plan.

    `device` is what the run says of its own, and `found` what the records tell (`measured`).
    """
    if config is None:
        return [], "No plan: the configuration cannot be read."
    card, gpus = card_of_device(device), int(ranks[1]) if (ranks := RANKS.match(device)) else 1
    try:
        if card is None:
            return _length(
                with_steps(config, gpus), gpus, found
            ), "Time and memory are planned for GPUs whose names are known, and this run has none."
        plan = make_plan(config, Machine(card, gpus))
    except P828Error as error:
        return [], f"No plan: {error}"
    one = plan.configured
    rows = [
        _row("seconds a step", one.time.seconds, found.get("seconds")),
        _row("tokens a second", plan.tokens_per_step / one.time.seconds, found.get("tokens_per_second")),
        _row("memory a GPU, GB", one.memory.allocated / 1e9, found.get("memory_bytes"), 1e-9),
        _row("hours in steps", plan.hours, found.get("hours")),
    ]
    return [*rows, *_length(plan.config, gpus, found)], f"Planned for {gpus} × {card.name}."


def _length(config: Config, gpus: int, found: Mapping[str, float]) -> list[dict[str, str]]:
    steps = config.train.steps
    tokens = steps * config.tokens_per_step * gpus
    return [_row("steps", steps, found.get("steps")), _row("tokens", tokens, found.get("tokens"))]


def _row(name: str, planned: float, real: float | None, unit: float = 1.0) -> dict[str, str]:
    """A line of the table, with what came in percent of what was planned. `unit` is that of `real`."""
    if real is None or not planned:
        return {"name": name, "planned": _shown(planned), "real": "–", "share": ""}
    real *= unit
    return {"name": name, "planned": _shown(planned), "real": _shown(real), "share": f"{real / planned:.0%}"}


def measured(columns: Mapping[str, NDArray[np.float32]], last: Mapping[str, float]) -> dict[str, float]:
    """`planned`'s second argument, of the columns of steps and the last place on each axis."""
    found = dict(last)
    numbers = {name: column[~np.isnan(column)] for name, column in columns.items()}
    for name in ("seconds", "tokens_per_second"):
        if len(usual := numbers.get(name, EMPTY)[FIRST_STEPS:]):
            found[name] = float(np.median(usual))
    if len(memory := numbers.get("memory_bytes", EMPTY)):
        found["memory_bytes"] = float(memory.max())
    return found


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 or number == int(number) else f"{number:.3g}"


def device(run: Path, started: Mapping[str, Any]) -> str:
    """What the run's last start recorded or, in earlier versions, its lines in the log say; empty if they do not."""
    if started.get("device"):
        return str(started["device"])
    try:
        text = read_limited(run / LOG_FILE, LONGEST_LOG).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
    found = DEVICE.findall(text)
    return found[-1] if found else ""


def _first_line(path: Path) -> str:
    """`p828 0.1.0, torch …, git …` of a config.toml; empty in a file that p828 did not write."""
    try:
        line = read_limited(path, LONGEST_LOG).decode("utf-8", "replace").partition("\n")[0]
    except (OSError, ValueError):
        return ""
    return line.removeprefix("# ") if line.startswith("# p828 ") else ""


def _versions(found: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, dict) else ""


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple | list) else str(value)
