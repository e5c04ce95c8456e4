"""Rules about the routing of tokens to experts: collapse, imbalance, and whether what balances it works."""

import math
from collections.abc import Sequence

from p828.health.finding import Finding
from p828.health.window import Record, Window, finite_list, list_of, number_of

SPAN = 32  # steps whose mean counts, and which are compared with as many before
GRACE = 96  # steps; a fresh router sends most tokens to few experts until the bias has moved, for about 60 steps
COLLAPSED = 0.25  # of the experts beyond those of one token: exp(entropy of the loads) is below k + 0.25 (E - k)
RECOVERING = 0.03  # rise of the normalised load entropy within SPAN steps that says that balancing works
TOTAL = 0.01  # above the least entropy that is possible, ln k / ln E
TOTAL_STEPS = 24  # in a row; enough to say so even among the first steps
COLLAPSE_REFERENCE = (
    "OLMo-core watches the loads' entropy and dead experts; exp(entropy) is the number of experts in use. "
    "Shazeer et al. 2017 (arXiv 1701.06538, 4): a router left alone converges to always the same few experts"
)

IMBALANCED = 0.6  # of the way from even loads, 1, to all tokens on one expert, E / k
IMBALANCED_MOST = 2.5  # times the mean load, however many experts there are
IMPROVING = 0.95  # of the excess over SPAN steps before: less of it is on the way to balance
IMBALANCE_REFERENCE = (
    "GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961) give an expert room for 1.25 to 2 times the mean load; "
    "beyond it a device that holds the busiest expert keeps the others waiting"
)

MEASURED, FEWEST_MEASURED = 6, 3  # steps whose update was measured, in a row
UNMOVED_STEPS = 8  # after so many steps a bias that moves by a fixed rate is not zero
WRONG_SIGN = -0.5  # correlation of the last bias update with mean load - load; it is near 1 as the update is its sign
BALANCE_REFERENCE = "Wang et al. 2024 (arXiv 2408.15664): bias += rate · sign(mean load − load), after every step"

NO_GRADIENT = 1e-12  # norm; float32 has no smaller gradient that matters
AUX_REFERENCE = "Switch (arXiv 2101.03961, 2.2): the router learns balance from the loss's gradient alone"

UNIFORM = 0.99  # entropy of a token's normalised scores over ln E
LEAST_AUX = (0.9, 1.05)  # times the loss of even loads, 1 a layer; less than that has another sign or another formula
GAMED_REFERENCE = (
    "DeepSeek-V3 (arXiv 2412.19437, eq. 17-20): the loss is the sum of f_e P_e, least for uniform "
    "mean scores P whatever "
    "the loads f are"
)

MISCOUNTED = 0.005  # of tokens times experts a token; both are whole numbers, and equal
REROUTED = 1e-3  # of the tokens; recomputation by the same kernels gives the same choice
REROUTE_REFERENCE = (
    "the backward pass computes the gradient of the experts that were chosen again: another choice is another function"
)


def collapse(window: Window) -> list[Finding]:
    """Nearly all tokens of a layer go to few experts, and that does not get better."""
    facts = window.facts
    experts, per_token = facts.experts, facts.experts_per_token
    if experts <= per_token:
        return []
    least = math.log(per_token) / math.log(experts) if per_token > 1 else 0.0
    for layer, balances in enumerate(_by_layer(window, "balance")):
        total = _run_at_end([balance <= least + TOTAL for balance in balances])
        limit = math.log(per_token + COLLAPSED * (experts - per_token)) / math.log(experts)
        now, before = _two_means(balances)
        is_stuck = window.step >= GRACE and now <= limit and now - before < RECOVERING
        if total < TOTAL_STEPS and not is_stuck:
            continue
        since = window.step - (total if total >= TOTAL_STEPS else 2 * SPAN) + 1
        return [
            Finding(
                "router_collapse",
                "critical",
                window.step,
                max(since, 1),
                f"layer {layer} uses {experts**now:.1f} of its {experts} experts (exp of the loads' entropy, mean of "
                f"{min(SPAN, len(balances))} steps; least possible {per_token}), and {_starved(window, layer)} get "
                "less than a tenth of the mean load",
                _collapse_cause(window),
                "turn balancing on (balance.update_rate = 1e-3), lower optimizer.learning_rate or lengthen the "
                "warm-up, and begin again from a checkpoint before it",
                COLLAPSE_REFERENCE,
            )
        ]
    return []


def _collapse_cause(window: Window) -> str:
    facts = window.facts
    if not facts.balance_rate and not facts.sequence_loss_weight:
        return "nothing balances the experts: balance.update_rate and balance.sequence_loss_weight are 0"
    auxiliary = _auxiliary(window)
    if auxiliary is not None and auxiliary < LEAST_AUX[0]:
        return f"the auxiliary loss is {auxiliary:.3g} a layer, and 1 is its least: its sign or its formula is wrong"
    return (
        "the router prefers a few experts by more than the balancing corrects: its logits grew too fast, as with a "
        "learning rate that is too high for it"
    )


def imbalance(window: Window) -> list[Finding]:
    """The busiest expert of a layer gets far more than the mean load."""
    facts = window.facts
    most = facts.experts / facts.experts_per_token
    limit = min(1 + IMBALANCED * (most - 1), IMBALANCED_MOST)
    if most <= 1 or window.step < GRACE:
        return []
    layers = [_two_means(shares) for shares in _by_layer(window, "max_share")]
    worst = max(range(len(layers)), key=lambda layer: layers[layer][0], default=None)
    if worst is None:
        return []
    now, before = layers[worst]
    if now < limit or now - 1 < IMPROVING * (before - 1):
        return []
    return [
        Finding(
            "load_imbalance",
            "warning",
            window.step,
            max(window.step - 2 * SPAN + 1, 1),
            f"the busiest expert of layer {worst} gets {now:.2f} times the mean load (mean of {SPAN} steps; even is 1, "
            f"{limit:.2f} is the limit, {most:.2g} is all tokens){_slower(window)}",
            "the balancing is too weak for this router, or switched off",
            "raise balance.update_rate, or lower optimizer.learning_rate",
            IMBALANCE_REFERENCE,
        )
    ]


def _slower(window: Window) -> str:
    """How much slower the steps have become since the loads were more even."""
    speeds = [mean for _, mean in window.history.means("tokens_per_second")]
    if len(speeds) < 8:
        return ""
    fastest, now = max(speeds[1:]), math.fsum(speeds[-4:]) / 4
    return f", and the run is {1 - now / fastest:.0%} slower than at its fastest" if now < 0.9 * fastest else ""


def bias(window: Window) -> list[Finding]:
    """The balance bias is not updated, or in the wrong direction."""
    facts = window.facts
    if not facts.balance_rate or facts.experts <= facts.experts_per_token:
        return []
    records = [record for record in window.measured if _is_applied(record)][-MEASURED:]
    if len(records) < FEWEST_MEASURED or records[-1]["step"] < UNMOVED_STEPS:
        return []
    largest = _columns(records, "bias_max")
    for layer, correlations in enumerate(_columns(records, "bias_load_correlation")):
        mean = math.fsum(correlations) / len(correlations)
        if not any(correlations):  # a bias that is balanced may be back at 0 in every measured step, but it moves
            is_zero = layer < len(largest) and not any(largest[layer])
            what = f"the balance bias of layer {layer} did not change in {len(correlations)} measured steps"
            what += f" and is 0, with balance.update_rate = {facts.balance_rate:g}" if is_zero else ""
            cause = "the bias is never updated" if is_zero else "the bias is not updated any more"
            return [_not_balancing(window, records, what, cause)]
        if mean < WRONG_SIGN:
            what = f"the updates of layer {layer}'s bias have a correlation of {mean:.2f} with mean load − load"
            cause = "the bias is updated with the wrong sign: busy experts get busier"
            return [_not_balancing(window, records, what, cause)]
    return []


def _not_balancing(window: Window, records: Sequence[Record], what: str, cause: str) -> Finding:
    return Finding(
        "bias_not_balancing",
        "critical",
        window.step,
        records[0]["step"],
        f"{what} (steps {records[0]['step']} to {records[-1]['step']})",
        cause,
        "mend the update of the bias: after every applied step, up for experts under the mean load, down for those "
        "above; loads are summed over micro-batches and ranks",
        BALANCE_REFERENCE,
    )


def auxiliary_loss(window: Window) -> list[Finding]:
    """An auxiliary loss that gives the router no gradient."""
    facts = window.facts
    if not facts.sequence_loss_weight and not facts.z_loss_weight:
        return []
    probes = [(probe, norm) for probe in window.probes if (norm := number_of(probe, "aux_gradient")) is not None]
    if not probes or max(norm for _, norm in probes) > NO_GRADIENT:
        return []
    weights = f"sequence_loss_weight = {facts.sequence_loss_weight:g}, z_loss_weight = {facts.z_loss_weight:g}"
    return [
        Finding(
            "aux_loss_without_gradient",
            "critical",
            window.step,
            probes[0][0]["step"],
            "the gradient of the router from the auxiliary loss alone is 0 at step "
            f"{probes[-1][0]['step']}, with {weights}",
            "the loss is computed from numbers without a gradient: from the chosen experts alone, or "
            "from detached scores",
            "compute it from the scores' mean over tokens, which has a gradient, times the share of tokens",
            AUX_REFERENCE,
        )
    ]


def gamed(window: Window) -> list[Finding]:
    """The auxiliary loss is at its least, and the loads are uneven all the same."""
    facts = window.facts
    if not facts.sequence_loss_weight:
        return []
    uneven = collapse(window) or imbalance(window)
    evidence = _least_loss(window) or _uniform_scores(window)
    if not uneven or not evidence:
        return []
    return [
        Finding(
            "aux_loss_gamed",
            "critical",
            window.step,
            uneven[0].since,
            f"{evidence}, but the loads are not even: {uneven[0].evidence}",
            "the router learned to please the auxiliary loss with equal scores, between which a hair decides",
            "lower balance.sequence_loss_weight and balance by the bias (balance.update_rate = 1e-3)",
            GAMED_REFERENCE,
        )
    ]


def _least_loss(window: Window) -> str:
    """Whether the recorded loss is the least that even loads would give, in words."""
    loss = _auxiliary(window)
    is_least = loss is not None and LEAST_AUX[0] <= loss <= LEAST_AUX[1]
    return f"the auxiliary loss is {loss:.3f}, and 1 is its least" if is_least else ""


def _auxiliary(window: Window) -> float | None:
    """The sequence-wise loss of a layer without its weight, which is 1 for even loads; None if it is not known."""
    facts, values = window.facts, window.numbers("aux_loss", SPAN)
    if not facts.sequence_loss_weight or facts.z_loss_weight or len(values) < SPAN // 2:
        return None
    return math.fsum(values) / len(values) / facts.sequence_loss_weight / facts.layers


def _uniform_scores(window: Window) -> str:
    """Whether the scores of a layer tell the experts hardly apart, in words."""
    columns = _columns(list(window.measured)[-MEASURED:], "router_entropy")
    entropies = [math.fsum(values) / len(values) for values in columns]
    if not entropies or max(entropies) < UNIFORM:
        return ""
    return (
        f"the scores are nearly uniform (entropy {max(entropies):.3f} of 1), so that the auxiliary loss is at its least"
    )


def miscounted(window: Window) -> list[Finding]:
    """A layer's loads do not add up to the step's tokens times the experts of a token."""
    per_token = window.facts.experts_per_token
    before: Record | None = None
    for record in window.recent:
        tokens = _tokens(record, before)
        before = record
        loads = record.get("load")
        if tokens is None or tokens <= 0 or not isinstance(loads, list):
            continue
        for layer, load in enumerate(map(finite_list, loads)):
            counted, right = math.fsum(load), tokens * per_token
            if not load:
                continue
            if abs(counted - right) > MISCOUNTED * right:
                return [
                    Finding(
                        "load_miscounted",
                        "critical",
                        window.step,
                        record["step"],
                        f"step {record['step']}: the experts of layer {layer} counted {counted:,.0f} tokens, and the "
                        f"step has {tokens:,.0f} tokens × {per_token} experts = {right:,.0f}",
                        _miscount_cause(counted / right),
                        "count loads where the forward pass of a training step returns them, once a micro-batch",
                        "each token of a step is counted at exactly num_experts_per_tok experts",
                    )
                ]
    return []


def _miscount_cause(ratio: float) -> str:
    if ratio > 1:
        return (
            f"other passes are counted, too, {ratio:.2f} times in all: evaluation, or "
            "recomputation in the backward pass"
        )
    return f"only {ratio:.2f} of the step is counted: one micro-batch or one rank, or tokens are dropped"


def _tokens(record: Record, before: Record | None) -> float | None:
    """Tokens of a step, from the sums that two records in a row have."""
    total = number_of(record, "tokens")
    if total is None:
        return None
    if record["step"] == 1:
        return total
    if before is None or before["step"] != record["step"] - 1 or (earlier := number_of(before, "tokens")) is None:
        return None
    return total - earlier


def reroutes(window: Window) -> list[Finding]:
    """Recomputation in the backward pass chooses other experts than the forward pass did."""
    probes = [(probe, share) for probe in window.probes if (share := number_of(probe, "reroute")) is not None]
    found = [(probe, share) for probe, share in probes if share > REROUTED]
    if not found:
        return []
    probe, share = max(found, key=lambda item: item[1])
    return [
        Finding(
            "recomputation_reroutes",
            "critical",
            window.step,
            found[0][0]["step"],
            f"{share:.2%} of the tokens go to other experts when a layer is computed again, at step {probe['step']}",
            "the recomputation differs from the forward pass: other kernels, another dtype, dropout "
            "with another random "
            "state, or a bias that was updated in between",
            "keep the chosen experts from the forward pass, or train.gradient_checkpointing = false; "
            "train.deterministic = true narrows it down",
            REROUTE_REFERENCE,
        )
    ]


def _by_layer(window: Window, name: str) -> list[list[float]]:
    """For each layer its numbers over the last 2 * SPAN steps."""
    columns = _columns(window.last(2 * SPAN), name)
    return columns if columns and len(columns[0]) >= TOTAL_STEPS else []


def _columns(records: Sequence[Record], name: str) -> list[list[float]]:
    """For each layer the numbers of the records that have them; empty if none has, or the number of layers differs."""
    rows = [values for record in records if (values := list_of(record, name))]
    return [list(column) for column in zip(*rows, strict=True)] if len({len(row) for row in rows}) == 1 else []


def _two_means(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the last SPAN values, and that of those before; the same one if there are no more."""
    now, before = values[-SPAN:], values[:-SPAN]
    mean = math.fsum(now) / len(now)
    return mean, (math.fsum(before) / len(before) if before else mean)


def _run_at_end(flags: Sequence[bool]) -> int:
    """How many are true in a row at the end."""
    count = 0
    for flag in reversed(flags):
        if not flag:
            break
        count += 1
    return count


def _starved(window: Window, layer: int) -> str:
    values = list_of(window.recent[-1], "starved")
    return f"{values[layer]:.0f}" if layer < len(values) else "some"


def _is_applied(record: Record) -> bool:
    return number_of(record, "loss") is not None and number_of(record, "grad_norm") is not None
