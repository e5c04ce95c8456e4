"""`p828 runs`: the runs of a directory, a line each."""

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.cells import cell_len, set_cell_size

from p828.cli.flags import parse
from p828.cli.output import printable
from p828.config.rules import check_path
from p828.config.values import shown_path
from p828.errors import warn
from p828.runs.listing import Listing, list_runs
from p828.runs.summary import RunSummary

USAGE = "p828 runs [DIR] [--json]"
DESCRIPTION = (
    f"{USAGE}\n\nLists the runs of a directory, the newest first: state, step, losses, speed and health. It reads the "
    "end of each run's records and no weights, and changes nothing, so that it may be asked while runs train. "
    "p828 doctor RUN says what is wrong with one."
)
COLUMNS = ("run", "state", "step", "loss", "val", "best", "tok/s", "health", "age")
DROPPED = ("best", "tok/s", "val", "age", "health", "loss")  # in this order, where a terminal is narrow
SHORTEST_NAME = 12
MOST_OTHERS = 5  # names that are shown
FIRST_LINE_AFTER, NEXT_LINE_AFTER = 2.0, 10.0  # seconds
WITH_REASON = ("damaged", "failed", "stopped")


@dataclass(frozen=True)
class Arguments:
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = "runs"
    """Directory that holds runs, or one run's."""
    json: bool = False
    """Print JSON only."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 runs", default=Arguments(), description=DESCRIPTION)
    check_path("DIR", given.directory)
    due = time.monotonic() + FIRST_LINE_AFTER

    def report(done: int, of: int) -> None:
        nonlocal due
        if time.monotonic() > due and done < of:
            warn(f"{given.directory}: {done:,} of {of:,} runs are read")
            due = time.monotonic() + NEXT_LINE_AFTER

    listing = list_runs(Path(given.directory), report)
    if given.json:
        print(json.dumps({"runs": [one.to_json() for one in listing.runs], "no_runs": listing.others}, indent=1))
        return
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns if has_width else None
    print(printable("\n".join(as_lines(listing, given.directory, width))), flush=True)


def as_lines(listing: Listing, directory: str, width: int | None = None) -> list[str]:
    """The table in at most `width` columns, and lines on what it does not show."""
    lines = _table(listing.runs, width) if listing.runs else [f"no runs in {directory}"]
    reasons = [f"{shown_path(run.name)}: {run.why}" for run in listing.runs if run.why and run.state in WITH_REASON]
    lines += ["", *_wrapped(reasons, width)] if reasons else []
    unread = sum(run.unread_bytes > 0 for run in listing.runs)
    if unread:
        of = "1 run" if unread == 1 else f"{unread:,} runs"
        text = f"Of {of} only the end of the records was read: earlier findings are not counted."
        lines += ["", *_wrapped([text], width)]
    if listing.others:
        more = f" and {len(listing.others) - MOST_OTHERS:,} more" if len(listing.others) > MOST_OTHERS else ""
        text = f"No runs: {', '.join(map(shown_path, listing.others[:MOST_OTHERS]))}{more}"
        lines += ["", *_wrapped([text], width)]
    return lines


def _wrapped(texts: Sequence[str], width: int | None) -> list[str]:
    if width is None:
        return list(texts)
    columns = max(width, SHORTEST_NAME)
    return [
        line for text in texts for line in textwrap.wrap(text, columns, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _table(runs: Sequence[RunSummary], width: int | None) -> list[str]:
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *map(_cells, runs)]
    columns = list(COLUMNS)
    if width is not None and _width(rows, columns, SHORTEST_NAME) > width:
        rows = [{**row, "health": row["health"].partition(":")[0]} for row in rows]
    for column in DROPPED:
        if width is None or _width(rows, columns, SHORTEST_NAME) <= width:
            break
        columns.remove(column)
    longest = max(cell_len(row["run"]) for row in rows)
    if width is not None:
        others = _width(rows, columns, 0)
        longest = max(min(longest, width - others), SHORTEST_NAME)
    left_out = [column for column in COLUMNS if column not in columns]
    note = [f"left out in {width} columns: {', '.join(left_out)}"] if left_out else []
    return [_line(row, rows, columns, longest) for row in rows] + note


def _width(rows: Sequence[dict[str, str]], columns: Sequence[str], of_name: int) -> int:
    return of_name + sum(2 + max(len(row[column]) for row in rows) for column in columns if column != "run")


def _line(row: dict[str, str], rows: Sequence[dict[str, str]], columns: Sequence[str], longest: int) -> str:
    name = row["run"] if cell_len(row["run"]) <= longest else set_cell_size(row["run"], longest - 1) + "…"
    cells = [set_cell_size(name, longest)]
    for column in columns[1:]:
        size = max(len(other[column]) for other in rows)
        cells.append(f"{row[column]:<{size}}" if column in ("state", "health") else f"{row[column]:>{size}}")
    return "  ".join(cells).rstrip()


def _cells(run: RunSummary) -> dict[str, str]:
    steps = "" if run.steps is None else f"/{run.steps:,}"
    cells = (
        shown_path(run.name),
        run.state,
        f"{'–' if run.step is None else format(run.step, ',')}{steps}",
        _loss(run.loss),
        _loss(run.validation_loss),
        _loss(run.best_loss),
        "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        f"{run.health}: {run.finding}" if run.finding else run.health or "–",
        _age(run.age_seconds),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _loss(loss: float | None) -> str:
    if loss is None:
        return "–"
    return f"{loss:.3f}" if abs(loss) < 1e4 else f"{loss:.3g}" if math.isfinite(loss) else str(loss)


def _age(seconds: float | None) -> str:
    """`12 s`, `5 min`, `3 h`, `2 d`."""
    if seconds is None:
        return "–"
    for size, unit in ((60, "s"), (60, "min"), (48, "h")):
        if seconds < size:
            return f"{seconds:.0f} {unit}"
        seconds /= size if unit != "h" else 24
    return f"{seconds:,.0f} d"
