"""The page: one HTML file with its code, its style, a charting library and the numbers in it.

The library is uPlot 1.6.32 (MIT; its licence lies beside it and is in the page). Text from a run gets into the page as
JSON and is shown as text only.
"""

import html
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files

from p828.health.rules.gradients import EXPLODING, LARGE
from p828.report.run import ReportedRun
from p828.report.series import compare_rows

STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = (
    "uPlot.iife.min.js", "numbers.js", "run.js", "charts.js", "marks.js", "chart.js", "heat_map.js", "findings.js",
    "samples.js", "about.js", "csv.js", "page.js",
)  # fmt: skip


def page(runs: Sequence[ReportedRun], version: int | None = None) -> Iterator[str]:
    """The page in pieces. One with a version of its numbers asks its server for news, and for those of all steps."""
    template = _file("index.html")
    head, _, rest = template.partition("<!-- styles -->")
    middle, _, end = rest.partition("<!-- scripts -->")
    title = html.escape(", ".join(names(runs)))
    yield head.replace("<!-- title -->", title)
    for name in STYLES:
        yield f"<style>\n{_file(name)}</style>\n"
    yield middle
    yield f'<script type="application/json" id="payload">{_json(payload(runs, version))}</script>\n'
    yield f"<!--\n{_file('uPlot.LICENSE')}-->\n"
    for name in SCRIPTS:
        yield f"<script>\n{_file(name)}</script>\n"
    if version is None:
        for number, run in enumerate(runs):
            if not run.overview_is_whole:
                for name, packed in run.details():
                    identity = html.escape(f"detail/{number}/{name}")
                    yield f'<script type="text/plain" id="{identity}">{packed}</script>\n'
    yield end


def payload(runs: Sequence[ReportedRun], version: int | None) -> dict[str, object]:
    """What the page's code reads, in JSON values."""
    return {
        "version": version,
        "thresholds": {"large": LARGE, "exploding": EXPLODING},
        "same_rows": [_same_rows(runs[0], run, names(runs)[0]) for run in runs],
        "runs": [{**run.overview(), "name": name} for run, name in zip(runs, names(runs), strict=True)],
    }


def names(runs: Sequence[ReportedRun]) -> list[str]:
    """What each run is called: its directory's name, or the whole path where two have the same."""
    short = [run.path.resolve().name for run in runs]
    return [str(run.path) if short.count(name) > 1 else name for run, name in zip(runs, short, strict=True)]


def _same_rows(first: ReportedRun, run: ReportedRun, name: str) -> str:
    """Whether a run was trained on the rows of the first one, whose name is given, in words; empty for itself."""
    if run is first:
        return ""
    compared, other = compare_rows(first.series, run.series)
    if not compared:
        return f"no step's rows can be compared with those of {name}"
    if other is None:
        return f"those of {name} in all {compared:,} steps of both"
    return f"others than in {name} from step {other:,} on"


def _json(values: object) -> str:
    """JSON that ends no element of a page, whatever text is in it."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (files("p828") / "report" / "page" / name).read_text(encoding="utf-8")
