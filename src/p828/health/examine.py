"""All rules over a window, the most probable cause first."""

from collections.abc import Callable, Iterable

from p828.health.finding import SEVERITIES, Finding
from p828.health.rules import data, loss
from p828.health.window import Window

Rule = Callable[[Window], list[Finding]]

RULES: tuple[Rule, ...] = (
    loss.spikes,
    loss.divergence,
    loss.rising,
    loss.validation_gap,
    data.repeats,
    data.epochs,
    data.token_ids,
)

CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "spike_unrecovered": ("divergence", "loss_rising", "validation_gap"),
    "divergence": ("loss_rising",),
}
"""What follows from each finding, and is left out where the cause itself was found."""


def examine(window: Window) -> list[Finding]:
    """What the rules find: at most one finding a rule's name, without those that follow from another one."""
    if not window.step:
        return []
    worst: dict[str, Finding] = {}
    for rule in RULES:
        for finding in rule(window):
            if finding.rule not in worst or finding.is_worse_than(worst[finding.rule]):
                worst[finding.rule] = finding
    return ordered(worst.values())


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The most probable cause first: by severity, then causes in the order of `CONSEQUENCES`, then by their step."""
    found = {finding.rule: finding for finding in findings}
    hidden = {rule for cause in found for rule in CONSEQUENCES.get(cause, ())}
    order = {rule: number for number, rule in enumerate(CONSEQUENCES)}
    return sorted(
        (finding for rule, finding in found.items() if rule not in hidden),
        key=lambda finding: (SEVERITIES.index(finding.severity), order.get(finding.rule, len(order)), finding.since),
    )
