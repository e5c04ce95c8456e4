"""All that a page shows of one run, read from its directory, and read on while the run trains."""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from p828.config import Config, load
from p828.errors import ConfigError, P828Error
from p828.files import directory_near, open_regular
from p828.health.examine import ordered
from p828.health.finding import Finding, finding_of
from p828.health.of_run import Course, merge
from p828.report.about import about, device, measured, planned, settings
from p828.report.buckets import edges, means, places, thinned
from p828.report.encoding import encoded_array, packed_array
from p828.report.heat_map import HeatMap
from p828.report.series import Series
from p828.runs import records
from p828.runs.file_names import CONFIG_FILE, RECORDS_FILE
from p828.runs.summary import summary
from p828.system.slow_count import SlowCount

MOST_POINTS = 2000  # of evaluations, and of events
MOST_SAMPLES = 100  # steps with samples: of more, every second one is left out again
LONGEST_SAMPLE = 2000  # characters
ACCEPTED = "a run's directory or its name under runs/ is accepted"
LINES_A_COUNT = 1024  # between two looks at the clock
SHOWN_EVENTS = ("started", "resume", "rollback", "non_finite", "diverged", "not_saved", "damaged", "ended", "slow_link")
TEXTS = ("text", "command", "why", "state")  # of an event, the first one that it has


class ReportedRun:
    """A run's records as the page shows them. `update` reads what was written since."""

    def __init__(self, path: Path, report: Callable[[str], None] = lambda text: None, with_rules: bool = True) -> None:
        """Read the whole run; if it takes long, `report` gets a line now and then. ConfigError for what is no run.

        `with_rules` has the rules look for findings; otherwise those are shown that the run itself recorded.
        """
        if not (path / CONFIG_FILE).is_file():
            if path.is_dir():
                raise ConfigError(f"{path}: no run: it holds no {CONFIG_FILE}; {ACCEPTED}")
            raise ConfigError(f"{path}: no such directory; {_advice(path)}")
        self.path, self._report, self._with_rules = path, report, with_rules
        self.summary = summary(path)
        self.findings: list[Finding] = []
        self._told: set[str] = set()
        """Rules of which `report` was told that they fail."""
        self._begin((0, 0))
        self.update()

    def _begin(self, files: tuple[int, int]) -> None:
        self._files, self._offset, self._samples_every, self._num_samples = files, 0, 1, 0
        self.series, self.heat_map = Series(), HeatMap()
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.started: dict[str, Any] = {}
        """The record of the run's last start; empty for a run of a version that made none."""
        self.recorded: dict[str, Finding] = {}
        """What the run itself found, by rule."""
        self.config, self.problem = _configuration(self.path)
        self.course = Course(self.path) if self._with_rules and self.config is not None else None

    def update(self) -> bool:
        """Read the records that came since the last time; whether the run has anything new to show.

        Files that were made anew, as when a run goes on from a checkpoint, are read from their start.
        """
        before = self._state()
        count = SlowCount(self._report, f"{self.path}: the records of {{:,}} steps are read")
        for number, line in enumerate(self._new_lines()):
            record = records.parsed(line)
            if record is not None:
                self._add(record)
            if number % LINES_A_COUNT == 0:
                count.to(len(self.series))
        self.findings = ordered(self.recorded.values()) if self.course is None else self._found(self.course)
        self.summary = summary(self.path)
        return before != self._state()

    def _found(self, course: Course) -> list[Finding]:
        """What the rules find. A rule that fails is left out, and its traceback shown once."""
        found = course.findings()
        for name in course.failed.keys() - self._told:
            where = "".join(traceback.format_exception(course.failed[name])).rstrip()
            self._report(f"{self.path}: the rule {name} failed, which is a fault of p828's, and is left out\n{where}")
        self._told |= course.failed.keys()
        return found

    def _state(self) -> tuple[object, ...]:
        """What is another one where there is something new to show."""
        found = tuple((finding.rule, finding.severity, finding.since) for finding in self.findings)
        return self._files, self._offset, self.summary.state, found

    def _new_lines(self) -> Iterator[bytes]:
        path = self.path / RECORDS_FILE
        if not path.exists():
            return
        try:
            with open_regular(path) as raw:
                status = os.fstat(raw.fileno())
                files = status.st_ino, os.stat(self.path / CONFIG_FILE).st_ino
                if files != self._files or status.st_size < self._offset:
                    self._begin(files)
                raw.seek(self._offset)
                rest = b""
                while piece := raw.read(records.PIECE):
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        self._offset += len(line) + 1
                        yield line
                    if len(rest) > records.LONGEST_LINE:
                        raise ConfigError(f"{path}: a line is longer than {records.LONGEST_LINE:,} bytes")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None

    def _add(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if self.course is not None:
            self.course.add(record)
        if kind == "step" and 0 < step < 2**53:
            self.series.add(record)
            if "load" in record:
                self.heat_map.add(step, record["load"])
        elif kind == "eval":
            while self.evaluations and self.evaluations[-1]["step"] >= step:  # the run went on from an earlier one
                self.evaluations.pop()
            _add_point(self.evaluations, {"step": step, "loss": records.finite_number(record.get("loss"))})
        elif kind == "sample":
            self._add_samples(step, record.get("samples"))
        elif kind == "event" and (event := str(record.get("event"))) in SHOWN_EVENTS:
            if event == "started":
                self.started = record
            text = next((str(record[key]) for key in TEXTS if record.get(key)), "")
            _add_point(self.events, {"step": step, "event": event, "text": text[:LONGEST_SAMPLE]})
        elif kind == "finding" and (finding := finding_of(record)) is not None:
            merge(self.recorded, [finding])

    def _add_samples(self, step: int, samples: Any) -> None:
        while self.samples and self.samples[-1]["step"] >= step:
            self.samples.pop()
        self._num_samples += 1
        if not isinstance(samples, list) or self._num_samples % self._samples_every:
            return
        pairs = [[str(text)[:LONGEST_SAMPLE] for text in pair] for pair in samples if isinstance(pair, list)]
        self.samples.append({"step": step, "samples": pairs})
        if len(self.samples) > MOST_SAMPLES:
            del self.samples[1:-1:2]
            self._samples_every *= 2

    @property
    def overview_is_whole(self) -> bool:
        """Whether the overview has every step as it is."""
        return len(edges(len(self.series))) == len(self.series)

    def overview(self) -> dict[str, Any]:
        """The run in JSON values, its curves thinned (`buckets`) and encoded (`encoding`)."""
        starts = edges(len(self.series))
        axes = self.series.axes()
        columns = {name: self.series.column(name) for name in self.series.columns}
        last = {name: float(axis[-1]) for name, axis in axes.items() if len(axis)}
        is_whole = self.overview_is_whole
        plan, plan_remark = planned(self.config, device(self.path, self.started), measured(columns, last))
        return {
            "summary": self.summary.to_json(),
            "count": len(self.series),
            "whole": is_whole,
            "axes": {name: encoded_array(places(axis, starts)) for name, axis in axes.items()},
            "columns": {name: encoded_array(thinned(column, starts)) for name, column in columns.items()},
            "means": {} if is_whole else {name: encoded_array(means(of, starts)) for name, of in columns.items()},
            "evaluations": self.evaluations,
            "samples": self.samples,
            "events": self.events,
            "findings": [finding.to_json() for finding in self.findings],
            "problem": self.problem or "; ".join(f"the rule {name} failed, and is left out" for name in self._told),
            "heat_map": self.heat_map.to_json(),
            "about": about(self.path, self.started),
            "settings": settings(self.path),
            "plan": {"rows": plan, "remark": plan_remark},
            "max_grad_norm": self.config.optimizer.max_grad_norm or None if self.config is not None else None,
        }

    def details(self) -> Iterator[tuple[str, str]]:
        """Name and packed numbers of every axis and column with all of their steps."""
        for name, axis in self.series.axes().items():
            yield name, packed_array(axis)
        for name in self.series.columns:
            yield name, packed_array(self.series.column(name))

    def detail(self, name: str) -> str | None:
        """One of `details`; None for a name that is none."""
        axes = self.series.axes()
        if name in axes:
            return packed_array(axes[name])
        return packed_array(self.series.column(name)) if name in self.series.columns else None


def _advice(path: Path) -> str:
    """Which run may be meant, beside the path or, of a name alone, under runs/."""
    places = [path, Path(Config().runs_dir) / path] if path.name == str(path) else [path]
    return next(filter(None, map(directory_near, places)), ACCEPTED)


def _configuration(run: Path) -> tuple[Config | None, str]:
    """The run's settings, or None and why they cannot be read: they may be another version's."""
    try:
        return load(str(run / CONFIG_FILE)), ""
    except P828Error as error:
        return None, f"the rules of run health did not look at it: {error}"


def _add_point(points: list[dict[str, Any]], point: dict[str, Any]) -> None:
    points.append(point)
    if len(points) > MOST_POINTS:
        del points[1:-1:2]
