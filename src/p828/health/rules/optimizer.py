"""Rules about the optimizer: whether it does to the weights what it says."""

import math

from p828.health.finding import Finding
from p828.health.window import Record, Window, number_of, parts_of

STEPS = 16  # in a row
MOVES = 0.0  # an update that changes anything
LOST = 0.02  # share of the numbers that an update changes; with float32 weights it is near 1
LOST_REFERENCE = (
    "bfloat16 has 8 bits: an update under 1/256 to 1/512 of a weight is rounded away (Zamirai et al. 2020, arXiv "
    "2010.06192), so masters are kept in float32"
)
HIGH_RATIO = 0.1  # mean update over mean weight
LOW_RATIO = 1e-6
RATIO_STEPS = 64
RATIO_REFERENCE = "Karpathy, makemore part 3, and CS231n: the update-to-weight ratio should be about 1e-3"
MATRICES = ("embedding", "attention", "routed_experts", "shared_experts", "head")
RESUMED_STEPS = 4


def moves(window: Window) -> list[Finding]:
    """Parts, or the whole model, that get a gradient and do not change."""
    records = [record for record in window.recent if _should_move(record)][-STEPS:]
    resumed = window.resumed_at
    since_resume = [record for record in records if resumed is not None and record["step"] > resumed]
    if len(since_resume) >= RESUMED_STEPS and (still := _still(since_resume)) and still == _known(since_resume):
        return [_resumed(window, since_resume)]
    if len(records) < STEPS:
        return []
    still, known = _still(records), _known(records)
    if not still:
        return []
    step, steps = records[0]["step"], f"steps {records[0]['step']} to {records[-1]['step']}"
    if still == known:
        return [
            Finding(
                "updates_lost",
                "critical",
                window.step,
                step,
                f"no sampled weight changed in {steps}, at a rate of {records[-1]['lr']:.3g}",
                "the optimizer updates other tensors than those that the layers compute with, or the updates are lost "
                "in rounding",
                "see that the optimizer holds the model's own parameters, and float32 masters of bfloat16 ones",
                LOST_REFERENCE,
            )
        ]
    part = ", ".join(still)
    norm = max(parts_of(records[-1], "grad_norms").get(each, 0.0) for each in still)
    return [
        Finding(
            "frozen_part",
            "critical",
            window.step,
            step,
            f"{part} did not change in {steps}, with a gradient norm of {norm:.3g}, while "
            f"{', '.join(each for each in known if each not in still)} did",
            "the optimizer does not hold these parameters, or holds other tensors in their place",
            "see that every parameter is in one of the optimizer's groups; begin again from a checkpoint before step "
            f"{step} if there is one",
            "every parameter with a gradient is updated by AdamW, by about the rate",
        )
    ]


def _should_move(record: Record) -> bool:
    """Whether the step was applied, at a rate above 0."""
    rate = number_of(record, "lr")
    is_finite = number_of(record, "loss") is not None and number_of(record, "grad_norm") is not None
    return is_finite and rate is not None and rate > 0 and bool(parts_of(record, "update_ratios"))


def _known(records: list[Record]) -> list[str]:
    """The parts with a gradient in all of the records, or of which no gradient is known."""
    norms = [parts_of(record, "grad_norms") for record in records]
    parts = parts_of(records[-1], "update_ratios")
    return [part for part in parts if all(each.get(part, 1.0) > 0 for each in norms)]


def _still(records: list[Record]) -> list[str]:
    """Those of them that no record saw change."""
    return [
        part
        for part in _known(records)
        if all(parts_of(record, "update_ratios").get(part, 1.0) <= MOVES for record in records)
    ]


def _resumed(window: Window, records: list[Record]) -> Finding:
    return Finding(
        "resume_without_training",
        "critical",
        window.step,
        records[0]["step"],
        f"the run was resumed from step {window.resumed_at}, and no sampled weight changed in steps "
        f"{records[0]['step']} to {records[-1]['step']}, at a rate of {records[-1]['lr']:.3g}",
        "the optimizer that was loaded updates other tensors than the model's",
        "load the state into the optimizer's own tensors; resume again from the same checkpoint",
        "a step with a gradient and a rate above 0 changes the weights",
    )


def lost(window: Window) -> list[Finding]:
    """Updates that bfloat16 rounds away: most numbers stay as they are, step after step."""
    rows = [
        changed for record in window.last(STEPS) if _should_move(record) and (changed := parts_of(record, "changed"))
    ]
    if len(rows) < STEPS or not window.is_bfloat16:
        return []
    means = {part: math.fsum(row.get(part, 1.0) for row in rows) / len(rows) for part in MATRICES if part in rows[-1]}
    if not means or max(means.values()) >= LOST:
        return []
    part = max(means, key=lambda part: means[part])
    return [
        Finding(
            "updates_lost",
            "critical",
            window.step,
            window.step - STEPS + 1,
            f"an update changes at most {means[part]:.2%} of the numbers of a part ({part}) in the last {STEPS} steps",
            "the updates are smaller than bfloat16's rounding, and nothing keeps what is rounded off",
            "keep float32 masters, or round stochastically; a run of p828 does",
            LOST_REFERENCE,
        )
    ]


def ratio(window: Window) -> list[Finding]:
    """Updates that are too large or too small for the weights, after the warm-up."""
    begun = window.facts.schedule.warmup_steps + RATIO_STEPS
    rows = [row for record in window.last(RATIO_STEPS) if (row := parts_of(record, "update_ratios"))]
    if window.step < begun or len(rows) < RATIO_STEPS // 2:
        return []
    means = {part: math.fsum(row.get(part, 0.0) for row in rows) / len(rows) for part in MATRICES if part in rows[-1]}
    if not means:
        return []
    highest, lowest = max(means, key=lambda part: means[part]), min(means, key=lambda part: means[part])
    if means[highest] <= HIGH_RATIO and means[lowest] >= LOW_RATIO:
        return []
    part = highest if means[highest] > HIGH_RATIO else lowest
    is_high = part == highest and means[highest] > HIGH_RATIO
    return [
        Finding(
            "update_ratio",
            "note",
            window.step,
            window.step - RATIO_STEPS + 1,
            f"an update is {means[part]:.2g} of the weights of {part} in the mean of {len(rows)} "
            "steps; about 1e-3 is usual",
            "the learning rate is high for weights of this size" if is_high else "the learning rate is low, or decayed",
            "lower optimizer.learning_rate, if the loss is noisy"
            if is_high
            else "raise optimizer.learning_rate, if the loss hardly falls",
            RATIO_REFERENCE,
        )
    ]
