"""A run's findings as a table, or as JSON for a program."""

import json
from pathlib import Path

from p828.cli.status_lines import show_status
from p828.errors import RunFailed, warn
from p828.health.finding import Finding
from p828.health.of_run import findings_of
from p828.train.log.console import waiting


def show_findings(directory: Path, as_json: bool) -> None:
    """What the rules find in the records of a run. Raises RunFailed, at the end, if a finding is critical."""
    with waiting(f"reading the records of {directory}", warn):
        findings = findings_of(directory)
    if as_json:
        print(json.dumps({"run": str(directory), "findings": [finding.to_json() for finding in findings]}, indent=2))
    elif not findings:
        print(f"{directory}: nothing found in its records")
    else:
        for finding in findings:
            _show(finding)
    critical = [finding.rule for finding in findings if finding.severity == "critical"]
    if critical:
        raise RunFailed(f"{directory}: {', '.join(critical)}")


def _show(finding: Finding) -> None:
    steps = (
        f"step {finding.since:,}" if finding.since == finding.step else f"steps {finding.since:,} to {finding.step:,}"
    )
    show_status(
        finding.severity, finding.rule, f"{steps}: {finding.evidence}", f"cause: {finding.cause}",
        f"to do: {finding.remedy}", f"rule: {finding.reference}",
    )  # fmt: skip
