"""What a check found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Check:
    name: str
    """Of what was looked at, as `disk`."""
    status: Status
    """`failure`: a run cannot begin, or would compute something else. `warning`: it would be slower, or do without."""
    text: str
    """What was found, with its numbers."""
    remedy: str = ""
    """What to do about it; empty where nothing is to be done."""


def worst(checks: Sequence[Check]) -> Status:
    """`ok` of no checks."""
    found = {check.status for check in checks}
    return "failure" if "failure" in found else "warning" if "warning" in found else "ok"
