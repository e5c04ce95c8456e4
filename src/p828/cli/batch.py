"""`p828 batch`: the rows that a run was trained on at a step, with the documents that they are made of."""

import json
import shutil
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from p828.cli.flags import parse_given
from p828.cli.output import printable
from p828.config.rules import check_path
from p828.data.trace import MANY_REPEATS, TracedRow
from p828.errors import ConfigError, RunFailed, warn
from p828.runs.step_batch import StepBatch, documents_of_step
from p828.train.log.console import waiting
from p828.train.signals import interruptible

USAGE = "p828 batch RUN --step N [--json]"
DESCRIPTION = (
    f"{USAGE}\n\nPrints the rows of the step's batch, each with its source, shard, documents and their first words. "
    "They are made again from the data, from the newest checkpoint before the step on, and compared with the hash "
    "that the step's record has. Exit code 1 if they are other rows: the data has changed since."
)
WIDEST = 120


@dataclass(frozen=True)
class Arguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's directory."""
    step: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(required)")] = 0
    """The step, counted from 1."""
    json: bool = False
    """Print JSON only."""


def run(arguments: list[str]) -> None:
    given, flags = parse_given(Arguments, arguments, prog="p828 batch", description=DESCRIPTION)
    check_path("RUN", given.run)
    if "step" not in flags:
        raise ConfigError(f"no --step given. Usage: {USAGE}")
    with waiting(f"reading {given.run} and its data up to step {given.step:,}", warn):
        found = interruptible(lambda: documents_of_step(Path(given.run), given.step, warn))
        found.rows  # noqa: B018  # decoded within the wait
    print(json.dumps(as_json(given.run, found), indent=1) if given.json else _as_text(found), flush=True)
    if found.recorded not in (None, found.hash):
        raise RunFailed(
            f"{given.run}: these are not the rows of step {found.step:,}: their hash is {found.hash}, and its record "
            f"has {found.recorded}.\nThe data has changed since, or the step was trained with other settings than "
            "the checkpoints beside it"
        )


def as_json(run: str, found: StepBatch) -> dict[str, Any]:
    return {
        "run": run,
        "step": found.step,
        "from_checkpoint": str(found.start) if found.start else None,
        "hash": found.hash,
        "recorded_hash": found.recorded,
        "is_as_recorded": None if found.recorded is None else found.hash == found.recorded,
        "rows": [asdict(row) for row in found.rows],
    }


def _as_text(found: StepBatch) -> str:
    length = found.config.data.sequence_length
    compared = {None: "the run has no record of the step to compare with", found.hash: "as in the step's record"}
    start = f"the checkpoint {found.start.name}" if found.start else "the beginning of the data"
    lines = [
        f"step    {found.step:,}: {len(found.rows)} rows of {length:,} tokens, from {start} on",
        f"hash    {found.hash}, {compared.get(found.recorded, f'not {found.recorded} as in the record')}",
        *(line for number, row in enumerate(found.rows, start=1) for line in _row(number, row)),
    ]
    return printable("\n".join(lines))


def _row(number: int, row: TracedRow) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, WIDEST), 40)
    repeats = f", repeats an n-gram {row.repeats:,} times" if row.repeats >= MANY_REPEATS else ""
    lines = [f"row {number}, {row.source}{repeats}"]
    for document in row.documents:
        text = f"{document.tokens:,} tokens of {document.in_words()}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return lines
