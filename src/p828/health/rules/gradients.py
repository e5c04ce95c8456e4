"""Rules about gradients: those that are not finite, too large, missing, or counted wrongly."""

import math

from p828.health.finding import Finding
from p828.health.window import Record, Window, number_of, parts_of

CRITICAL_IN_A_ROW = 3  # steps in a row that are not finite: also what ends a run without rollbacks
CURRENT_STEPS = 256  # after so many finite steps the run has come out of it by itself
NON_FINITE_REFERENCE = 'Project 828, red flags: "Loss becomes NaN: reduce learning rate"'

LARGE = 5.0  # Project 828: healthy below 5, warning 5 to 10, critical above 10
EXPLODING = 10.0
LARGE_STEPS = 100  # "consistently"
LARGE_SHARE = 0.5  # of these steps

NORM_TOLERANCE = (
    0.02  # of the global norm, which is the root of the sum of the parts' squares; float32 and bfloat16 sums
)
NORM_STEPS, FEWEST_NORMS, NORMS_WITHIN = 8, 4, 80  # ZeRO stage 2 has the parts' norms in every tenth step
OTHER_MATRICES = ("attention", "shared_experts", "head")
# Of the experts' norm over theirs; in 62 runs of tiny models, healthy and faulty, it was 0.06 to 0.7 after step 40.
LEAST_SHARE, MOST_SHARE = 1 / 40, 4.0
SETTLED_STEPS = 40

NO_GRADIENT_STEPS = 16  # in a row with a norm of exactly 0


def non_finite(window: Window) -> list[Finding]:
    """Steps whose loss or gradient was no finite number, and whether such a gradient was applied."""
    applied = _applied(window)
    if applied is not None:
        return [applied]
    if not window.num_non_finite:
        return []
    last = window.non_finite[-1]
    in_a_row = _in_a_row(window)
    first = window.non_finite[-in_a_row]
    record = next((record for record in window.recent if record["step"] == last), {})
    critical = in_a_row >= CRITICAL_IN_A_ROW and window.step - last < CURRENT_STEPS
    shown = f"loss {record.get('loss')}, gradient norm {record.get('grad_norm')}" if record else "no finite number"
    row = f", {in_a_row} in a row" if in_a_row > 1 else ""
    return [
        Finding(
            "non_finite",
            "critical" if critical else "warning",
            window.step,
            window.non_finite[-in_a_row] if critical else window.non_finite[0],
            f"{window.num_non_finite} steps were not applied{row}; the last is step {last}: {shown}. "
            + window.names_data(first),
            _non_finite_cause(window, record),
            "lower optimizer.learning_rate or lengthen the warm-up; rollback.after_steps = 3 leaves the data out",
            NON_FINITE_REFERENCE,
        )
    ]


def _non_finite_cause(window: Window, record: Record) -> str:
    if number_of(record, "loss") is not None:
        return "the backward pass overflowed, while the loss is finite"
    return "an overflow in the forward pass: weights or logits grew too large, or the data holds what it should not"


def _in_a_row(window: Window) -> int:
    """Non-finite steps in a row, up to the last one."""
    steps = list(window.non_finite)
    count = 1
    while count < len(steps) and steps[-count - 1] == steps[-count] - 1:
        count += 1
    return count


def _applied(window: Window) -> Finding | None:
    """A non-finite gradient that was applied: the weights are not finite, or moved at a step that was to be skipped."""
    for record in window.odd:
        if (what := _how_applied(window, record)) is None:
            continue
        return Finding(
            "non_finite_applied",
            "critical",
            window.step,
            record["step"],
            what,
            "the optimizer took a gradient that is not finite, and the weights are lost",
            "go back to a checkpoint before that step; an update must be skipped on all ranks where the loss or the "
            "gradient's norm is not finite",
            "Micikevicius et al. 2018 (arXiv 1710.03740, 3.2): a step whose gradient is not finite is skipped",
        )
    return None


def _how_applied(window: Window, record: Record) -> str | None:
    """What shows that the step's gradient was not finite and was applied; None if nothing does."""
    step, norm = record["step"], record.get("grad_norm")
    broken = _not_finite(record, "weight_norms")
    if broken:
        return f"the weights of {broken} are not finite after step {step}"
    if (parts := _not_finite(record, "grad_norms")) and number_of(record, "grad_norm") is not None:
        return f"the gradient of {parts} is not finite at step {step}, and the global norm, {norm:.4g}, leaves it out"
    moved = {
        part: value
        for name in ("update_ratios", "changed")
        for part, value in parts_of(record, name).items()
        if value != 0.0
    }
    if moved:
        part, value = next(iter(moved.items()))
        return f"step {step} had a gradient norm of {norm}, and the weights changed ({part}: {value:.3g})"
    # without these numbers: a gradient that is not finite beside a finite loss, after which every loss is lost
    after = [later for later in window.recent if later["step"] > step]
    has_loss = number_of(record, "loss") is not None
    if has_loss and len(after) >= 2 and all(number_of(later, "loss") is None for later in after):
        return (
            f"step {step} had a finite loss and a gradient norm of {norm}; all {len(after)} steps after it have no "
            "finite loss"
        )
    return None


def _not_finite(record: Record, name: str) -> str:
    """The parts whose number is not finite, in words."""
    return ", ".join(part for part, value in parts_of(record, name).items() if not math.isfinite(value))


def large_norm(window: Window) -> list[Finding]:
    """Project 828's red flag: a gradient norm that stays over 5, and over 10."""
    norms = window.numbers("grad_norm", LARGE_STEPS)
    if len(norms) < LARGE_STEPS:
        return []
    shares = {limit: sum(norm > limit for norm in norms) / len(norms) for limit in (LARGE, EXPLODING)}
    limit = next((limit for limit in (EXPLODING, LARGE) if shares[limit] >= LARGE_SHARE), None)
    if limit is None:
        return []
    return [
        Finding(
            "large_gradient_norm",
            "critical" if limit == EXPLODING else "warning",
            window.step,
            window.step - LARGE_STEPS + 1,
            f"the gradient norm was over {limit:g} in {shares[limit]:.0%} of the last {LARGE_STEPS} steps "
            f"(mean {math.fsum(norms) / len(norms):.2f}, highest {max(norms):.2f}); it is clipped to "
            f"{window.facts.max_grad_norm:g}",
            "the learning rate is too high for this data, or the positions or the attention are wrong",
            "lower optimizer.learning_rate; look at the data; model.use_qk_norm = true in a new run",
            'Project 828: "Healthy: < 5.0; Warning: 5-10; Critical: > 10", after 110,000 unstable steps',
        )
    ]


def expert_norm(window: Window) -> list[Finding]:
    """The experts' gradient does not add up with the others to the global norm, or is of another order."""
    pairs = [
        (record, parts, norm)
        for record in window.since_resume()[-NORMS_WITHIN:]
        if (parts := parts_of(record, "grad_norms")) and (norm := number_of(record, "grad_norm")) is not None
    ]
    pairs = pairs[-NORM_STEPS:]
    if len(pairs) < FEWEST_NORMS or not all("routed_experts" in parts for _, parts, _ in pairs):
        return []
    ratios = [math.sqrt(math.fsum(part**2 for part in parts.values())) / norm for _, parts, norm in pairs if norm > 0]
    if len(ratios) == len(pairs) and all(abs(ratio - 1) > NORM_TOLERANCE for ratio in ratios):
        record, parts, norm = pairs[-1]
        total = math.sqrt(math.fsum(part**2 for part in parts.values()))
        others = math.sqrt(math.fsum(v**2 for part, v in parts.items() if part != "routed_experts"))
        return [
            _expert_finding(
                window,
                pairs[0][0]["step"],
                f"the global gradient norm of step {record['step']} is {norm:.4g}, but its parts give {total:.4g} "
                f"({others:.4g} without the routed experts, which have {parts['routed_experts']:.4g})",
                _norm_cause(norm, total, others, parts["routed_experts"]),
            )
        ]
    return _scaled(window, [(record, parts) for record, parts, _ in pairs])


def _scaled(window: Window, pairs: list[tuple[Record, dict[str, float]]]) -> list[Finding]:
    """The experts' gradient is of another order than that of the other matrices."""
    shares = []
    for _, parts in pairs:
        others = math.sqrt(math.fsum(parts.get(part, 0.0) ** 2 for part in OTHER_MATRICES))
        shares.append(parts["routed_experts"] / others if others > 0 else 1.0)
    spikes, first = window.spikes.found, pairs[0][0]["step"]
    if first <= SETTLED_STEPS or (spikes and spikes[-1].last >= first):  # odd data has odd gradients
        return []
    is_off = all(share > MOST_SHARE for share in shares) or all(share < LEAST_SHARE for share in shares)
    if not is_off:
        return []
    mean = math.fsum(shares) / len(shares)
    return [
        _expert_finding(
            window,
            pairs[0][0]["step"],
            f"the gradient norm of the routed experts is {mean:.3g} times that of the other matrices in {len(shares)} "
            f"steps up to {pairs[-1][0]['step']}; 0.25 to 0.7 is usual",
            "the experts' gradient is scaled: by the ranks that hold them, the micro-batches, or the "
            "tokens of each expert",
        )
    ]


def _norm_cause(norm: float, total: float, others: float, experts: float) -> str:
    if abs(norm - others) < NORM_TOLERANCE * total:
        return "the global norm leaves the experts out, so that clipping is too weak"
    if norm > others and experts > 0:
        factor = math.sqrt(norm**2 - others**2) / experts
        return (
            f"the global norm counts the experts' gradient {factor:.2f} times: once a rank, or not averaged over ranks"
        )
    return "the global norm is not that of the gradients that the optimizer takes"


def _expert_finding(window: Window, since: int, evidence: str, cause: str) -> Finding:
    return Finding(
        "expert_gradient_norm",
        "critical",
        window.step,
        since,
        evidence,
        cause,
        "sum the squares of every gradient exactly once: those of experts over the ranks that hold them, "
        "those of the others on one rank",
        "Pascanu et al. 2013 (arXiv 1211.5063) clip by the global norm, the root of the sum of all squares",
    )


def no_gradient(window: Window) -> list[Finding]:
    """A part of the model gets no gradient at all."""
    having = [record for record in window.since_resume() if parts_of(record, "grad_norms")][-NO_GRADIENT_STEPS:]
    rows = [parts_of(record, "grad_norms") for record in having]
    if len(rows) < NO_GRADIENT_STEPS:
        return []
    silent = [part for part in rows[0] if all(row.get(part, 1.0) == 0.0 for row in rows)]
    if not silent or len(silent) == len(rows[0]):
        return []
    facts = window.facts
    is_known = silent == ["router"] and facts.experts_per_token == 1 and facts.norm_topk_prob
    return [
        Finding(
            "no_gradient",
            "warning" if is_known else "critical",
            window.step,
            having[0]["step"],
            f"the gradient of {', '.join(silent)} is exactly 0 in {NO_GRADIENT_STEPS} steps up to "
            f"{having[-1]['step']}, "
            f"that of {max(rows[-1], key=lambda part: rows[-1][part])} is {max(rows[-1].values()):.3g}",
            "with one expert a token and model.norm_topk_prob = true every weight is 1, whatever the router says"
            if is_known
            else "that part is detached from the loss: a tensor is copied or chosen where no gradient passes",
            "model.norm_topk_prob = false in a new run"
            if is_known
            else "find where its values enter the loss; compare with the plain code (model.attention_backend = "
            '"reference")',
            "a part that the loss depends on has a gradient; p828's tests compare each with float64",
        )
    ]
