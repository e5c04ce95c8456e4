"""Rules about the optimizer: whether it does to the weights what it says.

They look at the steps whose update was measured, every tenth.
"""

import math
from collections.abc import Sequence

from p828.health.finding import Finding
from p828.health.window import Record, Window, number_of, parts_of

MEASURED = 6  # steps at most that are looked at
FEWEST = 3
FEWEST_RESUMED = 2  # after a resume
DENSE = ("attention", "routed_experts", "shared_experts")  # parts of which every number gets a gradient
LOST = 0.5  # share of float32 numbers that an update changes; near 1, as all of them move
LOST_BFLOAT16 = 0.25  # of bfloat16 numbers, of which small updates leave most as they are until they add up
LOST_UPDATE = 0.15  # update over rate at which they do not add up: a share c of full updates is √c of their size
KEPT = 0.5  # share of masters with bits that bfloat16 lacks; of an update's 16 low bits all are 0 once in 65,536 times
LOST_REFERENCE = (
    "bfloat16 has 8 bits: an update under 1/256 to 1/512 of a weight is rounded away (Zamirai et al. 2020, arXiv "
    "2010.06192), so masters are kept in float32"
)
LEAST_UPDATE, MOST_UPDATE = 0.03, 3.0  # root mean square of the updates, over the rate
UPDATE_REFERENCE = (
    "AdamW's update is m / √v times the rate: 1 in the first step, 0.2 to 0.4 later (Liu et al. "
    "2025, Muon is Scalable, "
    "arXiv 2502.16982, 2.2), √((1 - β1) / (1 + β1)) = 0.23 for noise"
)
HIGH_RATIO, LOW_RATIO = 0.1, 1e-6  # update over weight
SETTLED_STEPS = 64  # in which drawn weights grow to their size
RATIO_REFERENCE = "Karpathy, makemore part 3, and CS231n: the update-to-weight ratio should be about 1e-3"


def moves(window: Window) -> list[Finding]:
    """Parts, or the whole model, that get a gradient and do not change."""
    records = _records(window)
    is_resumed = window.resumed_at is not None
    if len(records) < (FEWEST_RESUMED if is_resumed else FEWEST):
        return []
    still, known = _still(records), _known(records)
    if not still:
        return []
    steps = f"steps {records[0]['step']} to {records[-1]['step']}"
    if still == known:
        what = f"no sampled weight changed in {len(records)} measured steps of {steps}, at a rate of "
        what += f"{records[-1]['lr']:.3g}"
        if is_resumed:
            return [_resumed(window, records, f"the run was resumed from step {window.resumed_at}, and {what}")]
        return [_lost(window, records, what, "the optimizer updates other tensors than those of the layers")]
    if len(records) < FEWEST:
        return []
    norm = max(parts_of(records[-1], "grad_norms").get(part, math.nan) for part in still)
    return [
        Finding(
            "frozen_part",
            "critical",
            window.step,
            records[0]["step"],
            f"{', '.join(still)} did not change in {len(records)} measured steps of {steps}, with a gradient norm of "
            f"{norm:.3g}, while {', '.join(part for part in known if part not in still)} did",
            "the optimizer does not hold these parameters, or holds other tensors in their place",
            "see that every parameter is in one of the optimizer's groups, and begin again from a checkpoint before it",
            "every parameter with a gradient is updated by AdamW, by about the rate",
        )
    ]


def lost(window: Window) -> list[Finding]:
    """Updates that are rounded away: most numbers stay as they are."""
    records = _records(window)
    rows = [changed for record in records if (changed := parts_of(record, "changed"))]
    if len(rows) < FEWEST:
        return []
    if dropped := _dropped(window, records):
        return dropped
    means = {part: _mean([row[part] for row in rows]) for part in DENSE if all(part in row for row in rows)}
    sizes = _update_sizes(window, records)
    if window.is_bfloat16:
        is_lost = means.get("attention", 1.0) < LOST_BFLOAT16 and sizes.get("attention", 1.0) < LOST_UPDATE
    else:
        is_lost = bool(means) and max(means.values()) < LOST
    if not is_lost:
        return []
    part = max(means, key=lambda part: means[part])
    what = (
        f"an update changes at most {means[part]:.2%} of the numbers of a part ({part}), in {len(rows)} measured steps"
    )
    cause = "the updates are smaller than bfloat16's rounding, and nothing keeps what is rounded off"
    return [_lost(window, records, what, cause)]


def _dropped(window: Window, records: Sequence[Record]) -> list[Finding]:
    """Masters that have been rounded to bfloat16 when the next update begins."""
    begun = (window.resumed_at or 0) + 1  # whose masters are what was loaded, of another model bfloat16 numbers perhaps
    moving = [r for r in records if r["step"] > begun and parts_of(r, "update_ratios").get("attention")]
    shares = [row["attention"] for record in moving if "attention" in (row := parts_of(record, "low_bits"))]
    if len(shares) < FEWEST or _mean(shares) >= KEPT:
        return []
    what = f"before an update {_mean(shares):.2%} of the masters of attention have bits that bfloat16 lacks, in "
    what += f"{len(shares)} measured steps; nearly all have them after a float32 update"
    return [_lost(window, records, what, "what is rounded off in bfloat16 is dropped after each update")]


def size(window: Window) -> list[Finding]:
    """Updates that are not as large as the rate says."""
    records = _records(window)
    sizes = _update_sizes(window, records)
    wrong = {part: size for part, size in sizes.items() if not LEAST_UPDATE <= size <= MOST_UPDATE}
    if len(records) < FEWEST or not wrong:
        return []
    part = max(wrong, key=lambda part: abs(math.log(wrong[part])) if wrong[part] else 0.0)
    if not wrong[part]:  # `moves` tells of it
        return []
    return [
        Finding(
            "update_ratio",
            "critical",
            window.step,
            records[0]["step"],
            f"the updates of {part} are {wrong[part]:.3g} times the learning rate (root mean square "
            f"over {len(records)} "
            f"measured steps up to {records[-1]['step']}; 0.2 to 1 is usual)",
            "the optimizer does not use the rate that is recorded, or its moments are not those of the gradients",
            "compare the optimizer's rate, moments and eps with AdamW's; a gradient near "
            "optimizer.eps makes updates small",
            UPDATE_REFERENCE,
        )
    ]


def ratio(window: Window) -> list[Finding]:
    """Updates that are large or small for the weights, once these have grown."""
    records = [record for record in _records(window) if record["step"] > SETTLED_STEPS]
    rows = [parts_of(record, "update_ratios") for record in records]
    if len(rows) < FEWEST or window.step <= window.facts.schedule.warmup_steps + SETTLED_STEPS:
        return []
    means = {part: _mean([row[part] for row in rows]) for part in DENSE if all(part in row for row in rows)}
    outside = {part: mean for part, mean in means.items() if not LOW_RATIO <= mean <= HIGH_RATIO}
    if not outside:
        return []
    part, is_high = next(iter(outside)), next(iter(outside.values())) > HIGH_RATIO
    return [
        Finding(
            "update_ratio",
            "note",
            window.step,
            records[0]["step"],
            f"an update is {outside[part]:.2g} of the weights of {part} (mean of {len(rows)} measured "
            "steps); about 1e-3 "
            "is usual",
            "the learning rate is high for weights of this size" if is_high else "the learning rate is low, or decayed",
            "lower optimizer.learning_rate, if the loss is noisy"
            if is_high
            else "raise optimizer.learning_rate, if the loss hardly falls",
            RATIO_REFERENCE,
        )
    ]


def _records(window: Window) -> list[Record]:
    """The last measured steps that were applied at a rate above 0."""
    return [record for record in list(window.measured)[-2 * MEASURED :] if _should_move(record)][-MEASURED:]


def _should_move(record: Record) -> bool:
    is_finite = number_of(record, "loss") is not None and number_of(record, "grad_norm") is not None
    return is_finite and (number_of(record, "lr") or 0.0) > 0 and bool(parts_of(record, "update_ratios"))


def _known(records: Sequence[Record]) -> list[str]:
    """The parts with a gradient in all of the records, or of which no gradient is known."""
    norms = [parts_of(record, "grad_norms") for record in records]
    parts = parts_of(records[-1], "update_ratios")
    return [part for part in parts if all(each.get(part, 1.0) > 0 for each in norms)]


def _still(records: Sequence[Record]) -> list[str]:
    """Those of them that no record saw change."""
    rows = [parts_of(record, "update_ratios") for record in records]
    return [part for part in _known(records) if all(row.get(part, 1.0) == 0.0 for row in rows)]


def _update_sizes(window: Window, records: Sequence[Record]) -> dict[str, float]:
    """Root mean square of a part's updates over the learning rate, a mean over the records."""
    found: dict[str, list[float]] = {}
    for record in records:
        ratios, norms, rate = parts_of(record, "update_ratios"), parts_of(record, "weight_norms"), record["lr"]
        for part in DENSE:
            numbers = window.facts.numbers.get(part)
            if numbers and part in ratios and part in norms:
                found.setdefault(part, []).append(ratios[part] * norms[part] / math.sqrt(numbers) / rate)
    return {part: _mean(values) for part, values in found.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _resumed(window: Window, records: Sequence[Record], what: str) -> Finding:
    return Finding(
        "resume_without_training",
        "critical",
        window.step,
        records[0]["step"],
        what,
        "the optimizer that was loaded updates other tensors than the model's",
        "load the state into the optimizer's own tensors; resume again from the same checkpoint",
        "a step with a gradient and a rate above 0 changes the weights",
    )


def _lost(window: Window, records: Sequence[Record], what: str, cause: str) -> Finding:
    return Finding(
        "updates_lost",
        "critical",
        window.step,
        records[0]["step"],
        what,
        cause,
        "see that the optimizer holds the model's own parameters, and float32 masters of bfloat16 ones",
        LOST_REFERENCE,
    )
