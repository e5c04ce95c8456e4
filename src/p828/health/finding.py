"""What a rule found in a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
"""The worst first. `critical`: the run is wasted from here on; `warning`: look at it; `note`: good to know."""


@dataclass(frozen=True)
class Finding:
    rule: str
    """The rule's name, as `docs/health.md` lists it."""
    severity: Severity
    step: int
    """The step after which it was found."""
    since: int
    """The first step that it is true of."""
    evidence: str
    """A sentence with numbers and steps."""
    cause: str
    """The most probable cause."""
    remedy: str
    """What to do about it."""
    reference: str
    """Where the rule's threshold comes from."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def is_worse_than(self, other: "Finding") -> bool:
        return SEVERITIES.index(self.severity) < SEVERITIES.index(other.severity)

    def title(self) -> str:
        return f"{self.severity}: {self.rule} since step {self.since}"


def finding_of(record: Mapping[str, Any]) -> Finding | None:
    """The finding in a record of the kind "finding"; None if the record is damaged."""
    texts = ("rule", "severity", "evidence", "cause", "remedy", "reference")
    numbers = ("step", "since")
    is_whole = all(isinstance(record.get(key), str) for key in texts) and all(
        type(record.get(key)) is int for key in numbers
    )
    if not is_whole or record["severity"] not in SEVERITIES:
        return None
    return Finding(**{key: record[key] for key in (*texts, *numbers)})
