"""A run's directory as a window, and what its records tell from the first step to the last."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p828.config import load
from p828.errors import ConfigError
from p828.health.disk import look
from p828.health.examine import examine, ordered
from p828.health.facts import Facts
from p828.health.finding import Finding, finding_of
from p828.health.window import Record, Window
from p828.runs import records
from p828.runs.file_names import CONFIG_FILE, RECORDS_FILE

LOOKS = 400  # at most so many times the rules look at a run in the course of its steps
STEPS_A_LOOK = 32  # and not more often than this
OF_A_SCHEDULE = ("schedule_restart", "no_warmup", "learning_rate_high", "learning_rate_low")


def window_of(run: Path, now: float | None = None) -> Window:
    """The window at the end of a run's records. Raises ConfigError for a directory that is no run."""
    window = _empty(run)
    for record in readable(run):
        window.add(record)
    _look_at(window, run, now)
    return window


class Course:
    """What the rules find in the course of a run, whose records it takes in one by one."""

    def __init__(self, run: Path) -> None:
        """Raises ConfigError for a directory that is no run, or whose configuration cannot be read."""
        self.window = _empty(run)
        self._run, self._worst, self._recorded = run, dict[str, Finding](), list[Finding]()
        self._every, self._last = max(STEPS_A_LOOK, self.window.facts.steps // LOOKS), 0
        self.failed: dict[str, Exception] = {}
        """The errors of rules that raised, by the rule's name. They are left out from there on."""

    def add(self, record: Record) -> None:
        """Take in a record, and have the rules look at the window where it is their turn."""
        window = self.window
        window.add(record)
        if record.get("kind") == "finding" and (finding := finding_of(record)) is not None:
            self._recorded.append(finding)
        if record.get("event") == "resume":  # config.toml has the settings of the last start only
            self._worst = {rule: finding for rule, finding in self._worst.items() if rule not in OF_A_SCHEDULE}
        if window.step - self._last >= self._every or window.step < self._last:
            merge(self._worst, examine(window, self.failed))
            self._last = window.step

    def findings(self, now: float | None = None) -> list[Finding]:
        """What was found so far and is found now, the most probable cause first.

        A finding that is gone again is a finding still; its `step` is the last one at which it was found. The findings
        that the run itself recorded are among them. `now` is the time, in seconds since the epoch.
        """
        _look_at(self.window, self._run, now)
        worst = dict(self._worst)
        merge(worst, examine(self.window, self.failed))
        merge(worst, self._recorded)
        return ordered(worst.values())


def findings_of(
    run: Path,
    now: float | None = None,
    passed_over: list[int] | None = None,
    failed: dict[str, Exception] | None = None,
) -> list[Finding]:
    """What the rules find in the course of the run and at its end (`Course`).

    `now` is the time, in seconds since the epoch. `passed_over` gets the numbers of the lines that are no records, and
    `failed` the errors of rules that raised; without it the first one's passes. Raises ConfigError for a directory that
    is no run.
    """
    course, now = Course(run), time.time() if now is None else now
    for record in readable(run, passed_over):
        course.add(record)
    found = course.findings(now)
    if failed is None and course.failed:
        raise next(iter(course.failed.values()))
    (failed if failed is not None else {}).update(course.failed)
    return found


def merge(worst: dict[str, Finding], findings: list[Finding]) -> None:
    """Keep the worst finding of each rule, and of equally bad ones the newest with the earliest `since`."""
    for finding in findings:
        before = worst.get(finding.rule)
        if before is None or finding.is_worse_than(before):
            worst[finding.rule] = finding
        elif finding.severity == before.severity:
            newest = finding if finding.step >= before.step else before
            worst[finding.rule] = dataclasses.replace(newest, since=min(before.since, finding.since))


def readable(run: Path, passed_over: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The run's records; none if it has no file of them. `passed_over` gets the numbers of the lines that are none."""
    path = run / RECORDS_FILE
    if path.exists():
        yield from records.read(path, [] if passed_over is None else passed_over)


def _empty(run: Path) -> Window:
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG_FILE}")
    return Window(Facts.of(load(str(run / CONFIG_FILE)), run))


def _look_at(window: Window, run: Path, now: float | None) -> None:
    try:
        window.disk = look(run, now)
    except OSError as error:
        raise ConfigError(f"{error.filename or run}: cannot be read: {error.strerror}") from None
