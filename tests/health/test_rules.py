"""Each rule against records in which one thing is wrong, and none against records in which nothing is."""

import math
from collections.abc import Callable

import pytest
from windows import (
    FACTS,
    PARTS,
    RESUME,
    STEPS,
    Record,
    changed,
    evaluation,
    event,
    facts,
    found,
    healthy,
    loss,
    noise,
    only,
    probe,
    rules,
    step_record,
    steps,
    window,
)

from p828.config import ScheduleConfig
from p828.health.examine import CONSEQUENCES, examine
from p828.health.facts import Facts

NAN = math.nan
SPIKE = range(330, 333)


def trained(change: Callable[[Record], Record], since: int = 1, of: Facts = FACTS) -> list[Record]:
    """`steps` without evaluations, which would deny what the training loss says."""
    return [record for record in steps(change, since, of) if record["kind"] != "eval"]


def without(records: list[Record], *names: str) -> list[Record]:
    """As an earlier version wrote them."""
    return [{key: value for key, value in record.items() if key not in names} for record in records]


def probed(**numbers: float) -> list[Record]:
    return [*healthy(STEPS), probe(STEPS, **numbers)]


def restarted(record: Record) -> Record:
    return {"lr": FACTS.learning_rate(record["step"] - 120)}


def resumed(record: Record) -> Record:
    """What is measured after a resume that trains nothing."""
    return {"update_ratios": dict.fromkeys(PARTS, 0.0)} if "update_ratios" in record else {}


def skipped(record: Record, **numbers: float) -> Record:
    """A step that was not applied, with what was not finite."""
    still = dict.fromkeys(PARTS, 0.0)
    measured = {"update_ratios": still, "changed": still} if "changed" in record else {}
    return {"grad_norm": NAN, "grad_norms": dict.fromkeys(PARTS, NAN), **measured, **numbers}


def silent(part: str) -> Callable[[Record], Record]:
    """One part gets no gradient."""
    norms = {**dict.fromkeys(PARTS, 1.0), part: 0.0}
    return lambda record: {"grad_norm": math.sqrt(len(PARTS) - 1), "grad_norms": norms}


def pair(share: float) -> dict[str, list[float]]:
    return {"balance": [0.97, share]}


SEQUENCE = facts(sequence_loss_weight=1e-3)
BFLOAT16 = facts(dtype="bfloat16")
FAST = facts(peak_rate=0.3)
NO_WARMUP = facts(schedule=ScheduleConfig(kind="cosine", warmup_steps=0))
SLOW = facts(peak_rate=1e-6)

# By the rule that must come first: records in which one thing is wrong, and what the configuration says.
FAULTS: dict[str, tuple[list[Record], Facts]] = {
    "router_collapse": (steps(lambda r: pair(math.log(2) / math.log(8)), 60), FACTS),
    "load_imbalance": (steps(lambda r: {"max_share": [1.3, 3.1], "balance": [0.97, 0.85]}, 60), FACTS),
    "bias_not_balancing": (steps(lambda r: {"bias_load_correlation": [0.9, -0.9]}), FACTS),
    "aux_loss_without_gradient": ([*healthy(STEPS), probe(STEPS, aux_gradient=0.0)], SEQUENCE),
    "aux_loss_gamed": (steps(lambda r: {"aux_loss": 2.02e-3, **pair(math.log(2) / math.log(8))}, 60), SEQUENCE),
    "load_miscounted": (steps(lambda r: {"load": [[64] * 8] * 2}, 150), FACTS),
    "recomputation_reroutes": (probed(reroute=0.02), facts(recomputes=True)),
    "divergence": (trained(lambda r: {"loss": loss(r["step"]) + 0.05 * (r["step"] - 140)}, 140), FACTS),
    "spike_unrecovered": (trained(lambda r: {"loss": 4.5 + noise(r["step"])}, 150), FACTS),
    "non_finite": (steps(lambda r: skipped(r, loss=NAN), 198), FACTS),
    "expert_gradient_norm": (steps(only("routed_experts", 2.0, "grad_norms"), 100), FACTS),
    "loss_normalisation": (probed(loss_difference=loss(STEPS) / 2), FACTS),
    "attention_leak": (probed(batch_leak=0.4), FACTS),
    "token_out_of_vocabulary": (steps(lambda r: {"max_token": 300}, 150), FACTS),
    "validation_leak": (probed(validation_overlap=0.5), FACTS),
    "evaluation_not_deterministic": (probed(evaluation_difference=0.01), facts(dropout=0.1)),
    "data_repeats": (steps(lambda r: {"rows": step_record(r["step"] - 100)["rows"]}, 150), FACTS),
    "schedule_restart": (steps(restarted, 121), FACTS),
    "no_warmup": (steps(lambda r: {"lr": 3e-3} if r["step"] <= 20 else {}), FACTS),
    "learning_rate_high": (trained(lambda r: {"loss": 17.0 if r["step"] > 3 else loss(1)}, of=FAST), FAST),
    "learning_rate_low": (trained(lambda r: {"loss": 5.7 + noise(r["step"])}, of=SLOW), SLOW),
    "resume_without_training": ([*healthy(100), RESUME, *steps(resumed)[104:]], FACTS),
    "memory_growth": (steps(lambda r: {"memory_bytes": 400_000_000 + 10**6 * r["step"]}), FACTS),
    "host_bound": (steps(lambda r: {"host_seconds": 0.008}), FACTS),
    "data_starved": (steps(lambda r: {"data_seconds": 0.05, "seconds": 0.08}), FACTS),
    "recompiling": (steps(lambda r: {"compilations": 1}, 100), FACTS),
    "slow_links": ([*healthy(STEPS), event("slow_link", 0, "slow link: GPU0-GPU1 is connected by NODE")], FACTS),
    "frozen_part": (steps(only("head", 0.0, "update_ratios")), FACTS),
    "updates_lost": (steps(lambda r: {"changed": dict.fromkeys(PARTS, 0.1)} if "changed" in r else {}), FACTS),
    "no_gradient": (steps(silent("sinks"), 100), FACTS),
    "update_ratio": (steps(only("attention", 30.0, "update_ratios")), FACTS),
    "large_gradient_norm": (
        steps(lambda r: {"grad_norm": 12.0, "grad_norms": dict.fromkeys(PARTS, 12 / math.sqrt(8))}),
        FACTS,
    ),
}  # fmt: skip


def test_a_healthy_run_is_quiet() -> None:
    assert found(healthy(400)) == []
    assert found(healthy(400, SEQUENCE), SEQUENCE) == []


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_named_first(rule: str) -> None:
    records, of = FAULTS[rule]
    findings = found(records, of)
    assert findings, rule
    first = findings[0]
    assert first.rule == rule
    assert 0 <= first.since <= first.step == STEPS or rule == "non_finite"
    assert all((first.evidence, first.cause, first.remedy, first.reference))


@pytest.mark.parametrize("rule", FAULTS)
def test_records_of_earlier_versions_and_of_few_steps_raise_nothing(rule: str) -> None:
    records, of = FAULTS[rule]
    new = ("targets", "data_seconds", "max_token", "grad_norms", "weight_norms", "update_ratios", "changed")
    old = without(records, *new, "router_entropy", "bias_max", "bias_load_correlation", "load", "epoch", "seconds")
    for count in (0, 1, 2, 3, 10, 30, len(old)):
        examine(window(old[:count], of))
        examine(window(records[:count], of))


def test_a_cause_hides_what_follows_from_it() -> None:
    """A rate that is far too high, a loss that is not finite after it, and nothing else."""
    blown = trained(lambda r: {"loss": 17.0 if r["step"] > 3 else loss(1)}, of=FAST)
    records = changed(blown, 198, lambda r: skipped(r, loss=NAN))
    assert rules(records, FAST) == ["learning_rate_high"]
    assert all(rule not in consequences for rule, consequences in CONSEQUENCES.items())


def test_what_is_worse_than_its_cause_is_not_hidden() -> None:
    """One step is not finite, which p828 leaves out; the loss rises for good a hundred steps later."""
    records = changed(FAULTS["spike_unrecovered"][0], 30, lambda r: skipped(r, loss=NAN) if r["step"] == 30 else r)
    named = [(finding.severity, finding.rule) for finding in found(records)]
    assert named == [("critical", "spike_unrecovered"), ("warning", "non_finite")]


@pytest.mark.parametrize("skipped_at, hides", [(120, True), (30, False)])
def test_a_cause_that_is_over_hides_what_comes_soon_after_it(skipped_at: int, hides: bool) -> None:
    """One step is not finite, and a spike that comes back follows."""

    def change(record: Record) -> Record:
        if record["step"] == skipped_at:
            return skipped(record, loss=NAN)
        return {"loss": loss(record["step"]) + 2} if record["step"] in SPIKE else {}

    assert rules(changed(healthy(500), 1, change)) == ["non_finite", *([] if hides else ["spike"])]


@pytest.mark.parametrize("rise, expected", [(0.1, []), (2.0, ["spike"])])
def test_a_spike_that_comes_back_is_a_note(rise: float, expected: list[str]) -> None:
    records = steps(lambda r: {"loss": loss(r["step"]) + rise} if r["step"] < 153 else {}, 150)
    findings = found(records)
    assert [finding.rule for finding in findings] == expected
    if expected:
        assert (findings[0].severity, findings[0].since) == ("note", 150)
        assert "p828 batch runs/made-up --step 150" in findings[0].evidence


def test_a_spike_names_its_data_where_the_run_has_named_it() -> None:
    records = trained(lambda r: {"loss": 6.0}, 150)
    named = {"kind": "event", "step": 150, "event": "odd_batch", "data": "web, a.txt, document 3: “aaa”"}
    (first, *_) = found([*records[:160], named, *records[160:]])
    assert "web, a.txt, document 3: “aaa” (p828 batch runs/made-up --step 150)" in first.evidence


def test_validation_may_deny_that_a_run_has_diverged() -> None:
    """Data that is not well shuffled moves the training loss alone."""
    records = trained(lambda r: {"loss": 4.5 + noise(r["step"])}, 120)
    assert rules(records)[0] == "spike_unrecovered"
    first, second = (evaluation(step, 2.5) for step in (100, 180))
    assert "spike_unrecovered" not in rules([*records[:102], first, *records[102:], second])


def test_a_skipped_step_is_a_warning_and_an_applied_one_is_critical() -> None:
    once = steps(lambda r: skipped(r) if r["step"] == 150 else {})
    (finding,) = found(once)
    assert (finding.rule, finding.severity, finding.since) == ("non_finite", "warning", 150)
    broken = changed(once, 150, only("head", NAN, "weight_norms"))
    assert rules(broken)[0] == "non_finite_applied"
    unmeasured = without(changed(once, 151, lambda r: skipped(r, loss=NAN)), "weight_norms")
    (finding,) = found(unmeasured)
    assert (finding.rule, finding.since) == ("non_finite_applied", 150)


@pytest.mark.parametrize(
    "norm, words",
    [(math.sqrt(3), "leaves the experts out"), (math.sqrt(3 + 16), "counts the experts' gradient 4.00 times")],
)
def test_what_is_wrong_with_the_experts_norm_is_said(norm: float, words: str) -> None:
    parts = {"attention": 1.0, "head": 1.0, "embedding": 1.0, "routed_experts": 1.0}
    (finding,) = found(steps(lambda r: {"grad_norm": norm, "grad_norms": parts}))
    assert finding.rule == "expert_gradient_norm"
    assert words in finding.cause


@pytest.mark.parametrize("times", [1 / 64, 16])
def test_gradients_of_experts_that_are_scaled_are_of_another_order(times: float) -> None:
    parts = {**dict.fromkeys(PARTS, 0.3), "routed_experts": 0.25 * times}
    norm = math.sqrt(sum(part**2 for part in parts.values()))
    findings = found(steps(lambda r: {"grad_norm": norm, "grad_norms": parts}))
    assert [finding.rule for finding in findings] == ["expert_gradient_norm"]
    assert "times that of the other matrices" in findings[0].evidence


def test_gradients_of_odd_data_say_nothing_of_the_experts() -> None:
    parts = {**dict.fromkeys(PARTS, 0.3), "routed_experts": 0.25 * 16}
    norm = math.sqrt(sum(part**2 for part in parts.values()))
    odd = {"grad_norm": norm, "grad_norms": parts}
    noisy = trained(lambda r: {**odd, "loss": 4.5} if r["step"] < 180 else {}, 160)
    for count in range(160, STEPS):
        assert {"expert_gradient_norm"}.isdisjoint(rules(noisy[: count + 1]))


def test_a_bias_that_is_back_at_zero_is_no_bias_that_stands_still() -> None:
    """It swings by its rate, and every measured step is an even one."""
    swinging = steps(lambda r: {"bias_max": [0.0, 0.0]} if "bias_max" in r else {})
    assert found(swinging) == []
    still = changed(swinging, 1, lambda r: {"bias_load_correlation": [0.9, 0.0]} if "bias_max" in r else {})
    (finding,) = found(still)
    assert (finding.rule, finding.cause) == ("bias_not_balancing", "the bias is never updated")


def test_loads_are_recovering_or_not() -> None:
    """A fresh router that comes back is left alone, one that does not is named."""
    least = math.log(2) / math.log(8)
    rising = steps(lambda r: pair(min(least + 0.05 + 0.005 * max(r["step"] - 40, 0), 0.97)))
    for count in range(90, len(rising)):
        assert not found(rising[:count])
    stuck = steps(lambda r: pair(least + 0.05))
    assert rules(stuck)[0] == "router_collapse"


def test_the_first_loss_is_that_of_guessing() -> None:
    records = without(steps(lambda r: {"loss": 2 * loss(r["step"])}), "loss_difference")
    assert rules(records)[0] == "loss_normalisation"
    assert "loss_normalisation" not in rules(records, facts(is_from_scratch=False))


def test_a_rate_without_warm_up_is_a_note_until_it_harms() -> None:
    (note,) = found(healthy(STEPS, NO_WARMUP), NO_WARMUP)
    assert (note.rule, note.severity) == ("no_warmup", "note")
    harmed = steps(lambda r: {"loss": 6.4} if 1 < r["step"] < 5 else {}, of=NO_WARMUP)
    assert [(f.rule, f.severity) for f in found(harmed, NO_WARMUP)] == [("no_warmup", "warning")]


@pytest.mark.parametrize("share, expected", [(0.9, []), (0.05, ["updates_lost"])])
def test_bfloat16_numbers_change_now_and_then(share: float, expected: list[str]) -> None:
    """A share c of updates that are not rounded away has √c of the size of all of them."""
    small = 0.3 * math.sqrt(share)

    def change(record: Record) -> Record:
        if "changed" not in record:
            return {}
        ratio = small * record["lr"] * math.sqrt(10_000) / 10
        return {"changed": dict.fromkeys(PARTS, share), "update_ratios": dict.fromkeys(PARTS, ratio)}

    assert rules(steps(change), BFLOAT16) == expected


@pytest.mark.parametrize("share, expected", [(1.0, []), (0.0, ["updates_lost"])])
def test_bfloat16_masters_have_bits_of_their_own(share: float, expected: list[str]) -> None:
    """At a low rate few numbers change, and updates of the usual size say nothing of what is dropped after them."""
    low_bits = {"changed": dict.fromkeys(PARTS, 0.1), "low_bits": {"attention": share, "norms": 0.0}}
    assert rules(steps(lambda r: low_bits if "changed" in r else {}), BFLOAT16) == expected


def test_small_updates_are_the_cause_of_a_loss_that_stands_still() -> None:
    """Of a rate that is as it should be: a large eps makes the optimizer's steps small."""
    flat = trained(lambda r: {"loss": 5.7 + noise(r["step"])}, of=SLOW)
    small = changed(flat, 1, lambda r: {"update_ratios": dict.fromkeys(PARTS, 1e-9)} if "update_ratios" in r else {})
    assert rules(small, SLOW) == ["update_ratio"]


@pytest.mark.parametrize("steps_of_it, expected", [(7, []), (8, ["data_repeats"])])
def test_rows_that_are_twice_in_a_step(steps_of_it: int, expected: list[str]) -> None:
    records = steps(lambda r: {"repeated_rows": 0.125}, STEPS - steps_of_it + 1)
    assert rules(records) == expected


def test_loss_that_rises_over_5000_steps() -> None:
    of = facts(steps=20_000, schedule=ScheduleConfig(kind="constant", warmup_steps=20))
    flat = [step_record(step, of) for step in range(1, 12_001)]
    assert found(flat, of) == []
    rising = changed(flat, 6_000, lambda r: {"loss": r["loss"] + 2e-5 * (r["step"] - 6_000)})
    assert rules(rising, of) == ["loss_rising"]


def test_a_validation_loss_far_above_training() -> None:
    records = [record for record in healthy(STEPS) if record["kind"] == "step"]
    records = [*records[:100], evaluation(100, 4.0), *records[100:150], evaluation(150, 4.1), *records[150:]]
    assert rules([*records, evaluation(200, 4.3)]) == ["validation_gap"]
    assert rules([*records, evaluation(200, 2.3)]) == []


def test_one_expert_a_token_has_a_known_reason_for_a_router_without_gradient() -> None:
    of = facts(experts_per_token=1)
    records = steps(lambda r: {"load": [[16] * 8] * 2, **silent("router")(r)})
    assert [(f.rule, f.severity) for f in found(records, of)] == [("no_gradient", "warning")]
