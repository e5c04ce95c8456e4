"""What a run was: its settings, the command that trains it, versions, machine, and what the planner says of it."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p828.config import Config, load
from p828.config.files import read_toml
from p828.config.old_names import renamed
from p828.config.values import flatten
from p828.errors import P828Error
from p828.files import MEBIBYTE, read_limited
from p828.plan.plan import Machine, make_plan
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, LOG_FILE
from p828.runs.side_by_side import fingerprints, flat, newest_state
from p828.system.cards import Card, card_of_device

LONGEST_LOG = 4 * MEBIBYTE  # of which the first lines are read; a longer one is left out
DEVICE = re.compile(r"^.{19}   device +(\S.*)$", re.MULTILINE)
RANKS = re.compile(r"^(\d+) x ")
PLACES = ("name", "runs_dir")  # settings that make no other run
FIRST_STEPS = 10  # left out of the speed: they compile and warm up


def settings(run: Path) -> dict[str, str]:
    """Dotted key to value of the run's `config.toml`, as texts, and this version's default of a key that it lacks.

    Empty without a `config.toml`. A key that has another name now has that name.
    """
    if not (run / CONFIG_FILE).is_file():
        return {}
    given = flat(renamed(Config, read_toml(run / CONFIG_FILE), str(run))[0])
    defaults = {key: value for key, value in flatten(Config()).items() if key not in given}
    return {key: _text(value) for key, value in {**given, **defaults}.items() if key not in PLACES}


def about(run: Path) -> dict[str, str]:
    """Name to text: command, versions with the commit, machine and fingerprints, as far as the run's files tell."""
    found = {"directory": str(run), "command": f"p828 train {shlex.quote(str(run / CONFIG_FILE))}"}
    if versions := _first_line(run / CONFIG_FILE):
        found["versions"] = versions
    if device := _device(run):
        found["device"] = device
    prints = fingerprints(newest_state(run / CHECKPOINTS))
    return found | {f"{name}, fingerprint": text for name, text in prints.items()}


def planned(run: Path, found: Mapping[str, float]) -> tuple[list[dict[str, str]], str]:
    """Rows of what was planned and what came, and why there is no plan.

    `found` has what the records tell (`measured`). The cards are those that the run's log names.
    """
    try:
        config, (card, gpus) = load(str(run / CONFIG_FILE)), _cards(run)
        if card is None:
            return [], "The planner is about GPUs, and the log names none that it knows."
        plan = make_plan(config, Machine(card, gpus))
    except P828Error as error:
        return [], f"No plan: {error}"
    one = plan.configured
    pairs = [
        ("seconds a step", f"{one.time.seconds:.3g}", _shown(found.get("seconds"), 1.0)),
        ("memory a GPU, GB", f"{one.memory.allocated / 1e9:.2f}", _shown(found.get("memory_bytes"), 1e-9)),
        ("steps", f"{plan.config.train.steps:,}", _count(found.get("steps"))),
        ("tokens", f"{plan.tokens:,}", _count(found.get("tokens"))),
        ("hours in steps", f"{plan.hours:.3g}", _shown(found.get("hours"), 1.0)),
    ]
    rows = [{"name": name, "planned": plan_of, "real": real} for name, plan_of, real in pairs]
    return rows, f"Planned for {gpus} × {card.name}."


def measured(columns: Mapping[str, NDArray[np.float32]], last: Mapping[str, float]) -> dict[str, float]:
    """`planned`'s second argument, of the columns of steps and the last place on each axis."""
    found = dict(last)
    seconds, memory = (columns.get(name, np.empty(0, np.float32)) for name in ("seconds", "memory_bytes"))
    seconds, memory = seconds[FIRST_STEPS:][~np.isnan(seconds[FIRST_STEPS:])], memory[~np.isnan(memory)]
    if len(seconds):
        found["seconds"] = float(np.median(seconds))
    if len(memory):
        found["memory_bytes"] = float(memory.max())
    return found


def _shown(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value * unit:.3g}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{int(value):,}"


def _cards(run: Path) -> tuple[Card | None, int]:
    """The GPU that the run's log names, None if it names none that is known, and how many."""
    device = _device(run)
    ranks = RANKS.match(device)
    return card_of_device(device), int(ranks[1]) if ranks else 1


def _device(run: Path) -> str:
    """What the last start's lines in the log say of the device; empty if they say nothing."""
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


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple | list) else str(value)
