"""Where the rules about the loss begin and end: at spikes that are over, and at data that is meant to be other."""

from collections.abc import Callable, Iterable

import pytest
from windows import Record, evaluation, facts, loss, noise, step_record, window

from p828.health.examine import examine
from p828.health.facts import Facts
from p828.health.rules.loss import divergence

LONG = facts(steps=2000)
CALM = 300  # steps after which the loss of `windows.loss` falls no more


def steps(losses: Callable[[int], float], count: int) -> list[Record]:
    """Steps alone, without evaluations."""
    return [{**step_record(step, LONG), "loss": losses(step)} for step in range(1, count + 1)]


def found_on_the_way(records: Iterable[Record], of: Facts = LONG) -> set[tuple[str, str]]:
    """Rules and severities of what is found after any of the steps."""
    view, found = window([], of), set[tuple[str, str]]()
    for record in records:
        view.add(record)
        if record["step"] < CALM:
            continue
        found |= {(finding.rule, finding.severity) for finding in examine(view)}
    return found


@pytest.mark.parametrize("rise, length", [(3.0, 5), (5.0, 4), (10.0, 3), (15.0, 1)])
def test_a_spike_that_is_over_is_no_divergence(rise: float, length: int) -> None:
    """The mean of the last 24 steps is as high for some steps more."""
    records = steps(lambda step: loss(step) + rise * (301 <= step < 301 + length), 330)
    assert found_on_the_way(records) == {("spike", "note")}


def test_a_divergence_that_begins_with_a_spike_begins_at_the_spike() -> None:
    """A level before it that rose a little is no part of it."""
    records = steps(lambda step: 4 if step >= 160 else 2 + noise(step) + 0.02 * (step >= 100), 240)
    (finding,) = divergence(window(records, LONG))
    assert finding.since == 160


@pytest.mark.parametrize("mixture_steps, expected", [((0, 310), set()), ((0,), {"spike_unrecovered"})])
def test_another_mixture_has_another_loss(mixture_steps: tuple[int, ...], expected: set[str]) -> None:
    of = facts(steps=2000, mixture_steps=mixture_steps)
    records = steps(lambda step: loss(step) + 0.8 * (step > 310), 420)
    assert {rule for rule, _ in found_on_the_way(records, of)} == expected


def test_what_goes_wrong_under_another_mixture_is_seen() -> None:
    of = facts(steps=2000, mixture_steps=(0, 310))
    records = steps(lambda step: loss(step) + 0.8 * (step > 310) + 2 * (step >= 350), 420)
    found = examine(window(records, of))
    assert [(finding.rule, finding.severity, finding.since) for finding in found] == [
        ("spike_unrecovered", "critical", 350)
    ]


def test_a_hard_shard_is_a_warning() -> None:
    records = steps(lambda step: loss(step) + (310 <= step < 350), 420)
    assert found_on_the_way(records) == {("spike_unrecovered", "warning"), ("spike", "note")}


def test_a_loss_that_stays_or_that_an_evaluation_confirms_is_critical() -> None:
    records = steps(lambda step: loss(step) + (step >= 310), 400)
    bad = [evaluation(300, 2.0), evaluation(345, 3.0)]
    confirmed = [*records[:300], bad[0], *records[300:345], bad[1]]
    for found in (examine(window(records, LONG)), examine(window(confirmed, LONG))):
        assert [(finding.rule, finding.severity) for finding in found] == [("spike_unrecovered", "critical")]
