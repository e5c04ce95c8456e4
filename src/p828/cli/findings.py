"""A run's findings as a table, or as JSON for a program."""

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p828.cli.status_lines import show_headline, show_status
from p828.errors import RunFailed, warn
from p828.health.finding import SEVERITIES, Finding
from p828.health.of_run import findings_of
from p828.runs.file_names import RECORDS_FILE
from p828.runs.summary import RunSummary, summary
from p828.train.log.console import waiting


def show_findings(directory: Path, as_json: bool) -> None:
    """What the rules find in the records of a run. Raises RunFailed, at the end, if a finding is critical.

    As in a run at work, a rule that fails hides no other one's findings: its traceback is shown, and RunFailed raised.
    Raises ConfigError where the run's configuration or its records cannot be read.
    """
    damaged, failed = list[int](), dict[str, Exception]()
    with waiting(f"reading the records of {directory}", warn):
        findings, run = findings_of(directory, passed_over=damaged, failed=failed), summary(directory)
    _warn_of_damage(directory, damaged)
    if as_json:
        print(json.dumps(_as_json(directory, run, findings, failed), indent=2))
    else:
        show_headline(f"{directory}: {_state(run)}{'' if findings else '; no finding'}")
        for finding in findings:
            _show(finding)
    for error in failed.values():
        sys.stderr.write("".join(traceback.format_exception(error)))
    bad = [finding.rule for finding in findings if finding.severity == "critical"]
    bad += [f"the rule {name} failed, which is a fault of p828's, and is left out" for name in failed]
    if bad:
        raise RunFailed(f"{directory}: {', '.join(bad)}")


def _as_json(
    directory: Path, run: RunSummary, findings: Sequence[Finding], failed: Mapping[str, Exception]
) -> dict[str, Any]:
    """With the health that these findings tell: the run itself may have stored others, or none."""
    worst = min(findings, key=lambda finding: SEVERITIES.index(finding.severity), default=None)
    health = {"health": worst.severity if worst else "ok", "finding": worst.rule if worst else ""}
    found = {"run": str(directory), **run.to_json(), **health, "findings": [one.to_json() for one in findings]}
    found["failed_rules"] = {name: f"{type(error).__name__}: {error}" for name, error in failed.items()}
    del found["unread_bytes"]  # the rules have read all of them
    return found


def _warn_of_damage(directory: Path, damaged: Sequence[int]) -> None:
    """A line on the lines of the records that are none, by their numbers."""
    if damaged:
        more = f", and {len(damaged) - 1:,} more are none" if len(damaged) > 1 else ""
        left = "They are" if more else "It is"
        warn(f"{directory / RECORDS_FILE}: line {damaged[0]} is not a record{more}. {left} passed over")


def _state(run: RunSummary) -> str:
    """`complete, step 50 of 50`, and why where the run did not come to its end."""
    step = "no step yet" if run.step is None else f"step {run.step:,}"
    of = "" if run.steps is None else f" of {run.steps:,}"
    why = f" ({run.why})" if run.why and run.state != "complete" else ""
    return f"{run.state}, {step}{of}{why}"


def _show(finding: Finding) -> None:
    steps = (
        f"step {finding.since:,}" if finding.since == finding.step else f"steps {finding.since:,} to {finding.step:,}"
    )
    show_status(
        finding.severity, finding.rule, f"{steps}: {finding.evidence}", f"cause: {finding.cause}",
        f"to do: {finding.remedy}", f"rule: {finding.reference}",
    )  # fmt: skip
