"""`p828 compare`: what differs between two runs."""

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from p828.cli.flags import parse
from p828.cli.output import printable
from p828.cli.run_name import run_named
from p828.config.rules import check_path
from p828.config.values import shown
from p828.errors import warn
from p828.runs.side_by_side import APART, SMOOTHED, Comparison, Curves, Difference, Point, side_by_side
from p828.train.log.console import waiting

USAGE = "p828 compare RUN RUN [--json]"
DESCRIPTION = (
    f"{USAGE}\n\nTells what differs between two runs: settings, versions, data and the first step with other rows; "
    "losses at the same step and after as many tokens, validation, speed and memory. Runs that train now are accepted."
)
LABEL = 30
WIDEST, NARROW, NARROWEST = 120, 72, 20  # columns


@dataclass(frozen=True)
class Arguments:
    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's directory, or its name under runs/."""
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Another's."""
    json: bool = False
    """Print JSON only."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 compare", description=DESCRIPTION)
    for path in (given.first, given.second):
        check_path("RUN", path)
    with waiting("reading the records of both runs", warn):
        found = side_by_side(run_named(given.first), run_named(given.second))
    if given.json:
        print(
            json.dumps({"first": given.first, "second": given.second, **found.to_json()}, indent=1, default=str),
            flush=True,
        )
    else:
        print(printable("\n".join(as_lines(found, given.first, given.second))), flush=True)


def as_lines(found: Comparison, first: str, second: str) -> list[str]:
    """The comparison as text, a block a subject."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    indent = " " * (LABEL + 2) if width >= NARROW else ""
    lines = [f"{indent}first: {first}", f"{indent}second: {second}"]
    lines += ["", "settings" if found.settings else "settings: all the same", *_pairs(found.settings)]
    lines += ["", "versions" if found.versions else "versions: the same", *_pairs(found.versions)]
    lines += ["", *_data(found), *_pairs(found.data)]
    lines += ["", *(_curves(found.curves) if found.curves else ["losses: one of them has made no step"])]
    lines += ["", "speed", *_pairs(found.speed)] if found.speed else []
    return [part for line in lines for part in _wrapped(line, width)]


def _wrapped(line: str, width: int) -> list[str]:
    """A line that is too long, as several ones; lines of tables are made to fit before."""
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line.strip(), max(width, NARROWEST), initial_indent=indent, subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )  # fmt: skip


def _data(found: Comparison) -> list[str]:
    same = f"the same {' and '.join(found.same_data)}" if found.same_data else ""
    if not found.rows_compared:
        rows = "no step of both to compare the rows of"
    elif found.first_other_rows is None:
        rows = f"the same rows in all {found.rows_compared:,} steps of both"
    else:
        rows = f"other rows from step {found.first_other_rows:,} on"
    return [f"data: {'; '.join(filter(None, (same, rows)))}"]


def _curves(curves: Curves) -> list[str]:
    if not curves.last_step:
        return ["losses: they have no step in common"]
    if curves.first_unequal_step is None:
        head = f"losses: equal in every step up to {curves.last_step:,}"
    else:
        head = f"losses: unequal from step {curves.first_unequal_step:,} on"
        apart = curves.apart_from_step
        head += f", {APART} nats apart from step {apart:,} on" if apart else f", never {APART} nats apart"
    lines = [f"{head} (means of {SMOOTHED} steps)", *_points("step", curves.by_step)]
    lines += ["losses after as many tokens", *_points("tokens", curves.by_tokens)] if curves.by_tokens else []
    return lines + (["validation losses", *_points("step", curves.validation)] if curves.validation else [])


def _points(name: str, points: Sequence[Point]) -> list[str]:
    sizes = (15, 11, 11, 18)
    if shutil.get_terminal_size().columns < sum(sizes) + 2:
        sizes = (max([len(name), *(len(f"{point.at:,}") for point in points)]), 9, 9, 16)
    heads = (name, "first", "second", "second − first")
    lines = [f"  {''.join(f'{head:>{size}}' for head, size in zip(heads, sizes, strict=True))}"]
    for point in points:
        losses = (point.first, point.second, point.second - point.first)
        lines.append(
            f"  {point.at:>{sizes[0]},}"
            + "".join(_loss(loss, size) for loss, size in zip(losses, sizes[1:], strict=True))
        )
    return lines


def _loss(loss: float, size: int) -> str:
    return f"{loss:>{size}.4f}" if math.isfinite(loss) and abs(loss) < 1e4 else f"{loss:>{size}.3g}"


def _pairs(differences: Sequence[Difference]) -> list[str]:
    """A line for each, with both values in columns; a line for each value where one is long."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    room = max((width - LABEL - 6) // 2, 8)
    lines = []
    for one in differences:
        texts = [_value(value, one) for value in (one.first, one.second)]
        if len(one.name) <= LABEL - 2 and all(len(text) <= room for text in texts):
            lines.append(f"  {one.name:<{LABEL}}{texts[0]:<{room}}  {texts[1]}")
            continue
        if len(one.name) <= LABEL - 2 and all(len(text) <= width - LABEL - 2 for text in texts):
            lines += [f"  {one.name:<{LABEL}}{texts[0]}", f"  {'':<{LABEL}}{texts[1]}"]
            continue
        lines.append(f"  {one.name}")
        for text in texts:
            lines += textwrap.wrap(text, max(width - 4, 20), initial_indent="    ", subsequent_indent="      ")
    return lines


def _value(value: Any, one: Difference) -> str:
    text = "–" if value is None else f"{value:,}" if type(value) is int else shown(value, 200)
    text = text.strip("'") if isinstance(value, str) and value else text
    return f"{text} (default)" if one.default is not None and value == one.default else text
