"""All rules over a window, the most probable cause first."""

from collections.abc import Callable, Iterable

from p828.health.finding import SEVERITIES, Finding
from p828.health.rules import data, gradients, loss, optimizer, probes, resources, router, schedule, speed, state
from p828.health.window import Window

Rule = Callable[[Window], list[Finding]]

RULES: tuple[Rule, ...] = (
    probes.attention,
    probes.loss_normalisation,
    probes.validation,
    probes.evaluation,
    data.token_ids,
    data.repeats,
    data.repeats_within,
    data.epochs,
    gradients.non_finite,
    gradients.expert_norm,
    gradients.no_gradient,
    gradients.large_norm,
    optimizer.moves,
    optimizer.lost,
    optimizer.size,
    optimizer.ratio,
    router.bias,
    router.auxiliary_loss,
    router.gamed,
    router.collapse,
    router.imbalance,
    router.miscounted,
    router.reroutes,
    schedule.follows,
    schedule.warmup,
    schedule.rate_high,
    schedule.rate_low,
    loss.spikes,
    loss.divergence,
    loss.rising,
    loss.validation_gap,
    state.half_written,
    state.hang,
    resources.disk,
    resources.memory,
    speed.links,
    speed.recompiling,
    speed.starved,
    speed.host_bound,
)

_OF_THE_CURVE = ("spike_unrecovered", "divergence", "loss_rising", "large_gradient_norm", "validation_gap", "spike")
_OF_A_RATE = (*_OF_THE_CURVE, "non_finite", "router_collapse", "load_imbalance", "update_ratio")
_OF_THE_LOADS = ("router_collapse", "load_imbalance")

CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "non_finite_applied": (*_OF_THE_CURVE, "non_finite", *_OF_THE_LOADS, "update_ratio", "expert_gradient_norm"),
    "token_out_of_vocabulary": (*_OF_THE_CURVE, "non_finite"),
    "attention_leak": ("divergence", "loss_rising", "large_gradient_norm", "validation_gap"),
    "loss_normalisation": ("large_gradient_norm", "validation_gap", "validation_leak"),
    "half_written_state": _OF_THE_CURVE,
    "schedule_restart": (*_OF_A_RATE, "learning_rate_high", "no_warmup"),
    "learning_rate_high": (*_OF_A_RATE, "no_warmup"),
    "no_warmup": ("spike_unrecovered", "divergence", "spike", "large_gradient_norm", "non_finite"),
    "learning_rate_low": (),
    "expert_gradient_norm": ("large_gradient_norm",),
    "resume_without_training": ("updates_lost", "frozen_part", "learning_rate_low", "update_ratio"),
    "updates_lost": ("frozen_part", "learning_rate_low", "update_ratio", "bias_not_balancing"),
    "frozen_part": ("update_ratio",),
    "no_gradient": ("frozen_part", "update_ratio"),
    "aux_loss_without_gradient": ("aux_loss_gamed", *_OF_THE_LOADS),
    "bias_not_balancing": _OF_THE_LOADS,
    "aux_loss_gamed": _OF_THE_LOADS,
    "load_miscounted": _OF_THE_LOADS,
    "router_collapse": ("load_imbalance",),
    "recomputation_reroutes": (),
    "data_repeats": ("validation_gap",),
    "validation_leak": (),
    "evaluation_not_deterministic": ("validation_gap", "validation_leak"),
    "non_finite": ("spike_unrecovered", "spike", "large_gradient_norm"),
    "spike_unrecovered": ("divergence", "loss_rising", "validation_gap", "spike"),
    "divergence": ("loss_rising", "validation_gap", "large_gradient_norm"),
    "hang": (),
    "disk_filling": (),
    "slow_links": (),
    "recompiling": ("host_bound",),
    "data_starved": ("host_bound",),
    "update_ratio": ("learning_rate_low",),
}
"""The most probable cause first, and with each what follows from it and is left out where it was found itself."""

PASSING = ("no_warmup", "non_finite")
"""Causes that are over: what begins more than `AFTERWARDS` steps after them has another cause."""
AFTERWARDS = 256


def name_of(rule: Rule) -> str:
    """The file's and the function's name, as in `loss.spikes`."""
    return f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def examine(window: Window, failed: dict[str, Exception] | None = None) -> list[Finding]:
    """What the rules find: at most one finding a rule's name, without those that follow from another one.

    A rule that raises is put into `failed`, if it is given, by its name, and rules that are in there are left out.
    """
    worst: dict[str, Finding] = {}
    for rule in RULES if window.step else ():
        if failed is not None and name_of(rule) in failed:
            continue
        try:
            findings = rule(window)
        except Exception as error:
            if failed is None:
                raise
            failed[name_of(rule)] = error
            continue
        for finding in findings:
            if finding.rule not in worst or finding.is_worse_than(worst[finding.rule]):
                worst[finding.rule] = finding
    return ordered(worst.values())


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The most probable cause first: by severity, then in the order of `CONSEQUENCES`, then by the first step.

    A note hides nothing, and a warning nothing critical: what it tells of is no cause of anything worse.
    """
    found = {finding.rule: finding for finding in findings}
    hidden = {
        rule
        for cause in found.values()
        for rule in CONSEQUENCES.get(cause.rule, ())
        if rule in found and _hides(cause, found[rule])
    }
    order = {rule: number for number, rule in enumerate(CONSEQUENCES)}
    return sorted(
        (finding for rule, finding in found.items() if rule not in hidden),
        key=lambda finding: (SEVERITIES.index(finding.severity), order.get(finding.rule, len(order)), finding.since),
    )


def _hides(cause: Finding, consequence: Finding) -> bool:
    is_in_time = cause.rule not in PASSING or consequence.since <= cause.since + AFTERWARDS
    return is_in_time and cause.severity != "note" and not consequence.is_worse_than(cause)
