"""`p828 batch`: the rows that a run was trained on at a step, with the documents that they are made of."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from p828.cli.flags import parse_given
from p828.cli.output import printable
from p828.cli.run_name import run_named
from p828.config.rules import check_path
from p828.data.trace import MANY_REPEATS, TracedRow
from p828.errors import ConfigError, RunFailed, warn
from p828.inference.load import load_model
from p828.inference.row_losses import RowLoss, row_losses
from p828.runs.records import encoded
from p828.runs.step_batch import StepBatch, documents_of_step
from p828.system.device import explain_out_of_memory
from p828.train.log.console import waiting
from p828.train.signals import interruptible

USAGE = "p828 batch RUN --step N [--losses [--device DEVICE]] [--json]"
DESCRIPTION = (
    f"{USAGE}\n\nPrints the rows of the step's batch, each with its source, shard, documents and their first words. "
    "They are made again from the data, from the newest checkpoint before the step on, and compared with the hash "
    "that the step's record has. With --losses the model of that checkpoint says which rows and documents it finds "
    "hard, the hardest first. Exit code 1 if they are other rows: the data has changed since."
)
WIDEST, NARROWEST = 120, 20  # columns


@dataclass(frozen=True)
class Arguments:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's directory, or its name under runs/."""
    step: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(required)")] = 0
    """The step, counted from 1."""
    losses: bool = False
    """Also the loss of each row and document, by the model of the newest checkpoint before the step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where these losses are computed; `auto` takes the GPU if there is one."""
    json: bool = False
    """Print JSON only."""


def run(arguments: list[str]) -> None:
    given, flags = parse_given(Arguments, arguments, prog="p828 batch", description=DESCRIPTION)
    check_path("RUN", given.run)
    if "step" not in flags:
        raise ConfigError(f"no --step given. Usage: {USAGE}")
    if "device" in flags and not given.losses:
        raise ConfigError("--device: accepted with --losses")
    with waiting(f"reading {given.run} and its data up to step {given.step:,}", warn):
        found = interruptible(lambda: documents_of_step(run_named(given.run), given.step, warn))
        rows = list(zip(found.rows, _losses(found, given), strict=True))
    if given.losses:
        rows.sort(key=lambda row: -(row[1].loss or 0.0) if row[1] else 0.0)
    numbers = {id(row): number for number, row in enumerate(found.rows, start=1)}
    if given.json:
        print(json.dumps(encoded(_as_json(given.run, found, rows, numbers)), indent=1), flush=True)
    else:
        print(printable("\n".join(_as_lines(found, rows, numbers))), flush=True)
    if found.recorded not in (None, found.hash):
        raise RunFailed(
            f"{given.run}: these are not the rows of step {found.step:,}: their hash is {found.hash}, and its record "
            f"has {found.recorded}.\nThe data has changed since, or the step was trained with other settings than "
            "the checkpoints beside it"
        )


def _losses(found: StepBatch, given: Arguments) -> Sequence[RowLoss | None]:
    """Of every row. Raises ConfigError where no checkpoint before the step is left."""
    if not given.losses:
        return [None] * len(found.rows)
    if found.start is None:
        raise ConfigError(f"--losses: no checkpoint before step {found.step:,} is left to compute them with")
    with explain_out_of_memory("--losses", "Compute them with --device cpu"):
        loaded = load_model(found.start, given.device)
        return interruptible(lambda: row_losses(loaded.model, found.batches, loaded.dtype))


Rows = Sequence[tuple[TracedRow, RowLoss | None]]


def _as_json(run: str, found: StepBatch, rows: Rows, numbers: dict[int, int]) -> dict[str, Any]:
    shown = []
    for row, loss in rows:
        fields = {"row": numbers[id(row)], **asdict(row)}
        if loss is not None:
            fields["loss"] = loss.loss
            for document, own in zip(fields["documents"], loss.documents, strict=False):
                document["loss"] = own
        shown.append(fields)
    return {
        "run": run,
        "step": found.step,
        "from_checkpoint": str(found.start) if found.start else None,
        "hash": found.hash,
        "recorded_hash": found.recorded,
        "is_as_recorded": None if found.recorded is None else found.hash == found.recorded,
        "notes": found.notes,
        "rows": shown,
    }


def _as_lines(found: StepBatch, rows: Rows, numbers: dict[int, int]) -> list[str]:
    length = found.config.data.sequence_length
    compared = {None: "the run has no record of the step to compare with", found.hash: "as in the step's record"}
    start = f"the checkpoint {found.start.name}" if found.start else "the beginning of the data"
    lines = [
        f"step    {found.step:,}: {len(found.rows)} rows of {length:,} tokens, from {start} on",
        f"hash    {found.hash}, {compared.get(found.recorded, f'not {found.recorded} as in the record')}",
    ]
    if any(loss is not None for _, loss in rows):
        lines.append("losses  by the model of that checkpoint, in nats per token; the hardest rows first")
    lines += [f"source  {note}" for note in found.notes]
    width = max(min(shutil.get_terminal_size().columns, WIDEST), NARROWEST)
    wrapped = [line for text in lines for line in _wrap(text, width, "", " " * 8)]
    return wrapped + [line for row, loss in rows for line in _row(numbers[id(row)], row, loss, width)]


def _row(number: int, row: TracedRow, loss: RowLoss | None, width: int) -> list[str]:
    of_row = "" if loss is None or loss.loss is None else f", loss {loss.loss:.3f}"
    repeats = f", repeats an n-gram {row.repeats:,} times" if row.repeats >= MANY_REPEATS else ""
    lines = _wrap(f"row {number}, {row.source}{of_row}{repeats}", width, "", "    ")
    own = loss.documents if loss is not None else [None] * len(row.documents)
    for document, nats in zip(row.documents, own, strict=False):
        begin = "" if nats is None else f"loss {nats:.3f}: "
        text = f"{begin}{document.tokens:,} tokens of {document.in_words()}"
        lines += _wrap(text, width, "  ", "    ")
    return lines


def _wrap(text: str, width: int, first: str, further: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)
