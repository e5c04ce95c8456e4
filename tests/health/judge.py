"""What the rules found in a run: afterwards from its directory, and live, as the run itself recorded it."""

import json
from dataclasses import dataclass
from pathlib import Path

from proof_runs import FOUND, ProofRun

from p828.health.finding import Finding, finding_of
from p828.health.of_run import findings_of, readable

FIRST = 2  # findings among which the cause has to be


@dataclass(frozen=True)
class Verdict:
    run: ProofRun
    afterwards: list[Finding]
    """The most probable cause first."""
    live: list[Finding]
    """In the order in which the run recorded them."""

    @property
    def is_right(self) -> bool:
        """Whether the cause is among the first two findings afterwards."""
        return any(self._is_named_by(finding) for finding in self.afterwards[:FIRST])

    @property
    def found_live(self) -> int | None:
        """The step at which the run itself named the cause."""
        return next((finding.step for finding in self.live if self._is_named_by(finding)), None)

    def _is_named_by(self, finding: Finding) -> bool:
        return finding.rule in self.run.rules and self.run.words in finding.evidence

    @property
    def is_clean(self) -> bool:
        return not any(finding.severity == "critical" for finding in (*self.afterwards, *self.live))

    @property
    def warnings(self) -> set[str]:
        return {finding.rule for finding in (*self.afterwards, *self.live) if finding.severity == "warning"}


def judged(run: ProofRun, directory: Path) -> Verdict:
    path = directory / run.name
    found = path.with_name(path.name + FOUND)
    afterwards = findings_of(path) if not found.exists() else list(map(finding_of, json.loads(found.read_text())))
    live = [finding_of(record) for record in readable(path) if record["kind"] == "finding"]
    return Verdict(run, afterwards, [finding for finding in live if finding is not None])
