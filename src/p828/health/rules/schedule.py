"""Rules about the learning rate: whether it follows its schedule, and whether it suits the run."""

import math

from p828.health.finding import Finding
from p828.health.window import Record, Window, number_of, parts_of

FOLLOWS = 0.02  # relative; the schedule is a formula of the step alone
APART_STEPS = 3  # in a row
FAR = 3.0  # times what the schedule says: more than another shape of the same schedule gives

BLOWN_UP = 0.5  # nats above the first loss, which is that of guessing: worse than no model
EARLY = 64  # steps
BLOWN_STEPS = 8  # whose mean counts
HARMED = 0.3  # nats that the loss of a run without warm-up rises at first
SHORT_WARMUP = 0.2  # of a warm-up's first rate: more of the peak in the first step is none
FITTED_RATE, FITTED_ACTIVE = 2e-3, 275e6  # OLMo-core's fit, falling as 1 / active parameters
MOST_TIMES = 25.0  # the fitted rate: 0.05 for a small model, and no published run of AdamW has that
MEASURED, FEWEST_MEASURED = 6, 3  # steps whose update was measured
LARGEST_RATIO = 0.3  # mean update over mean weight, of a whole part of the model, step after step
USUAL_RATIO = "about 1e-3 is usual (Karpathy, makemore part 3; CS231n)"
HIGH_REFERENCE = (
    "OLMo-core's fits (2026-06): AdamW's best rate is 2e-3 for 275 M active parameters at 256k "
    "tokens a step and falls as "
    "1/active; the loss of a rate 10 times as high does not come under that of guessing"
)

LOW_STEPS = 128  # at the peak
LOW_FALL = 0.08  # of the first loss that is gained by then; a rate in range gains a quarter
HIGH_RATIO = 1e-2  # update over weight, at which a rate is not too low
LOW_REFERENCE = f"update-to-weight ratio: {USUAL_RATIO}; a hundredth of it learns a hundredth as fast"


def follows(window: Window) -> list[Finding]:
    """The recorded rates are not those of the run's schedule."""
    records = window.since_resume()
    if window.resumed_at is None:
        begun = records[0]["step"] if records else 0
        records = [*(record for record in window.first if record["step"] < begun), *records]
    apart: list[tuple[Record, float, float]] = []
    for record in records:
        rate, right = number_of(record, "lr"), window.facts.learning_rate(record["step"])
        if rate is None or right is None:
            continue
        if abs(rate - right) <= FOLLOWS * max(rate, right):
            if len(apart) >= APART_STEPS:
                break
            apart.clear()
        else:
            apart.append((record, rate, right))
    if len(apart) < APART_STEPS:
        return []
    return [_apart(window, apart)]


def _apart(window: Window, apart: list[tuple[Record, float, float]]) -> Finding:
    """What a rate that does not follow the schedule does instead."""
    facts, (record, rate, right) = window.facts, apart[0]
    step, (last_record, last_rate, _) = record["step"], apart[-1]
    evidence = (
        f"the learning rate of step {step} is {rate:.3g}, and the schedule's {right:.3g} ({len(apart)} such steps)"
    )
    restarted = facts.learning_rate(last_record["step"] - step + 1)
    if step > 1 and restarted is not None and abs(last_rate - restarted) <= FOLLOWS * max(last_rate, restarted):
        return _rate_finding(
            window,
            "schedule_restart",
            step,
            f"{evidence}: from step {step} on the rate is that of a run that begins there",
            "the schedule was restarted, as by a resume that forgets the step",
            "compute the rate from the run's step, and go back to a checkpoint before it",
        )
    if step <= facts.schedule.warmup_steps and rate > right:
        return _rate_finding(
            window,
            "no_warmup",
            step,
            f"{evidence}, within its warm-up of {facts.schedule.warmup_steps} steps",
            "the warm-up is left out",
            "warm up as schedule.warmup_steps says",
        )
    times = [each / should if should else math.inf for _, each, should in apart]
    if max(times) < FAR and min(times) > 1 / FAR:
        rule, cause = "schedule_restart", "the rate follows another schedule than the configuration's"
        remedy = "compare schedule and train.steps in config.toml with what was meant"
        return _rate_finding(window, rule, step, evidence, cause, remedy)
    is_high = max(times) >= FAR
    return _rate_finding(
        window,
        "learning_rate_high" if is_high else "learning_rate_low",
        step,
        f"{evidence}: {max(times) if is_high else min(times):.3g} times the schedule's",
        "the optimizer is given another rate than the schedule's",
        "give the optimizer the schedule's rate, and go back to a checkpoint before it",
    )


def _rate_finding(window: Window, rule: str, since: int, evidence: str, cause: str, remedy: str) -> Finding:
    reference = "the schedule is a formula of the step alone (p828.optim.schedule)"
    return Finding(rule, "critical", window.step, since, evidence, cause, remedy, reference)


def warmup(window: Window) -> list[Finding]:
    """A run that begins at its peak rate."""
    facts = window.facts
    first = window.first[0] if window.first else {}
    rate, loss = number_of(first, "lr"), number_of(first, "loss")
    if rate is None or loss is None or not facts.peak_rate or first["step"] != 1 or not facts.is_from_scratch:
        return []
    if facts.schedule.warmup_steps > 1 or rate < (1 - SHORT_WARMUP) * facts.peak_rate:
        return []
    losses = [(value, record["step"]) for record in window.first if (value := number_of(record, "loss")) is not None]
    highest, at = max(losses)
    is_harmed = highest - loss >= HARMED
    return [
        Finding(
            "no_warmup",
            "warning" if is_harmed else "note",
            window.step,
            1,
            f"the first step has the rate {rate:.3g}, the peak"
            + (f", and the loss rose from {loss:.3f} to {highest:.3f} at step {at}" if is_harmed else ""),
            "schedule.warmup_steps is 0: AdamW's second moments are estimated from the first steps alone",
            "schedule.warmup_steps of 1 % of the run, or 2,000",
            "Ma and Yarats 2019 (arXiv 1910.04209): Adam's first updates are too large; 2 / (1 - β2) steps of linear "
            "warm-up mend it",
        )
    ]


def rate_high(window: Window) -> list[Finding]:
    """A learning rate with which the model gets worse than guessing, or weights are replaced rather than trained."""
    facts = window.facts
    rates = [rate for record in (*window.first, *window.recent) if (rate := number_of(record, "lr")) is not None]
    if not rates or not facts.is_from_scratch:
        return []
    seen = _blown_up(window) or _replaced(window)
    fitted = FITTED_RATE * min(1.0, FITTED_ACTIVE / max(facts.active_parameters, 1))
    if not seen and max(rates) <= MOST_TIMES * fitted:
        return []
    since, text = seen or (
        1,
        f"the rate goes up to {max(rates):.3g}, {max(rates) / fitted:.3g} times the {fitted:.2g} that was found best "
        "for models of this size",
    )
    return [
        Finding(
            "learning_rate_high",
            "critical" if seen or not window.is_finite else "warning",
            window.step,
            since,
            text,
            f"optimizer.learning_rate = {facts.peak_rate:g} is too high for this model and batch",
            "a tenth of the rate, and a longer warm-up; p828 plan proposes one",
            HIGH_REFERENCE,
        )
    ]


def _blown_up(window: Window) -> tuple[int, str] | None:
    """A mean loss over some early steps that is above the first loss."""
    losses = [(record["step"], loss) for record in window.first if (loss := number_of(record, "loss")) is not None]
    if len(losses) < BLOWN_STEPS + 1 or losses[0][0] != 1:
        return None
    first, later = losses[0][1], losses[1:]
    means = [
        (math.fsum(loss for _, loss in later[i : i + BLOWN_STEPS]) / BLOWN_STEPS, later[i][0])
        for i in range(len(later) - BLOWN_STEPS + 1)
    ]
    highest, step = max(means)
    if highest - first < BLOWN_UP:
        return None
    return step, (
        f"the loss was {first:.3f} at the first step, that of guessing, and {highest:.3f} in the mean "
        f"of steps {step} to "
        f"{step + BLOWN_STEPS - 1}"
    )


def _replaced(window: Window) -> tuple[int, str] | None:
    """Updates of the size of the weights, long after the first steps."""
    records = [record for record in window.measured if record["step"] > EARLY][-MEASURED:]
    rows = [parts_of(record, "update_ratios") for record in records]
    means = {
        part: math.fsum(row[part] for row in rows) / len(rows)
        for part in ("attention", "routed_experts", "shared_experts")
        if len(rows) >= FEWEST_MEASURED and all(part in row for row in rows)
    }
    if not means or min(means.values()) < LARGEST_RATIO:
        return None
    part = max(means, key=lambda part: means[part])
    text = (
        f"an update is {means[part]:.2f} of the weights of {part} in {len(rows)} measured steps up to "
        f"{records[-1]['step']}; {USUAL_RATIO}"
    )
    return records[0]["step"], text


def rate_low(window: Window) -> list[Finding]:
    """A learning rate at which next to nothing is learned."""
    facts = window.facts
    begun = facts.schedule.warmup_steps + LOW_STEPS
    losses = [loss for record in window.first[:8] if (loss := number_of(record, "loss")) is not None]
    recent = window.numbers("loss", 32)
    if (
        window.step < begun
        or not losses
        or len(recent) < 32
        or not facts.is_from_scratch
        or window.first[0]["step"] != 1
    ):
        return []
    first, now = losses[0], math.fsum(recent) / len(recent)
    rows = [parts_of(record, "update_ratios") for record in list(window.measured)[-FEWEST_MEASURED:]]
    ratios = [row[part] for row in rows for part in ("attention", "routed_experts") if part in row]
    lowest = min(mean for _, mean in window.history.means("loss"))
    if not -LOW_FALL * first < first - now < LOW_FALL * first or first - lowest > 2 * LOW_FALL * first:
        return []
    if ratios and max(ratios) > HIGH_RATIO:
        return []
    known = f"; the largest update is {max(ratios):.1g} of the weights, and {USUAL_RATIO}" if ratios else ""
    return [
        Finding(
            "learning_rate_low",
            "warning",
            window.step,
            1,
            f"the loss fell from {first:.3f} to {now:.3f} in {window.step} steps, {LOW_STEPS} of them after the warm-up"
            + known,
            f"optimizer.learning_rate = {facts.peak_rate:g} is too low for this model and batch",
            "ten times the rate; p828 plan proposes one",
            LOW_REFERENCE,
        )
    ]
