"""Rules about the loss: spikes, divergence, a loss that rises, and how far validation is above training."""

import math
import statistics
from itertools import pairwise

from p828.health.finding import Finding
from p828.health.history import Block
from p828.health.spikes import Spike
from p828.health.window import Window, number_of

UNRECOVERED_STEPS = 32  # PaLM (arXiv 2204.02311, 5.1): most spikes come back by themselves, within some dozens of steps
SURE_STEPS, SURE_RISE = 64, 2.0  # a shard of another kind of text costs less, in nats, and is over by then
SPIKE_REFERENCE = (
    "OLMo-core, SkipStepOptimizer: a loss above mean + 6 standard deviations of the last 128 steps; here around its "
    "trend"
)

DIVERGED_STEPS = 24  # whose mean counts
DIVERGED_LATEST = 8  # the last of them, whose mean counts too: of a spike that is over the 24 steps tell still
DIVERGED_BEFORE = 3  # stretches of as many steps at least that are compared with, or half of the run
DIVERGED_RISE = 0.5  # nats above their median
DIVERGED_SPREADS = 3.0  # and times the median difference between two of them: data that is not shuffled well moves so
VALIDATION_RISE = 0.25  # nats above the best validation loss; less is a model about as good as ever
DIVERGED_REFERENCE = (
    "Wortsman et al. 2023 (arXiv 2309.14322): a loss that rises above its minimum and stays there has diverged; "
    "0.5 nats is a perplexity 1.6 times as high"
)

RISING_STEPS = 5_000  # Project 828: "Loss increases for >5K steps: check data pipeline"
RISING_BLOCKS = 5
RISING_NATS = 0.05  # over these steps; less is what data in another order gives

GAP_NATS = 1.0  # Project 828: "Val loss >> train loss"; e times the perplexity
GAP_EVALUATIONS = 2  # in a row
GAP_WORSE = 0.1  # nats that the last one is above the best: the gap opens on both sides


def spikes(window: Window) -> list[Finding]:
    """`spike_unrecovered` for a spike that did not come back, else `spike` for those that did."""
    current, found = window.spikes.current, []
    if current is not None and _is_lasting(window, current):
        found.append(_unrecovered(window, current))
    back = [spike for spike in window.spikes.found if spike.recovered is not None]
    if back:
        found.append(_recovered(window, back))
    return found


def _is_lasting(window: Window, spike: Spike) -> bool:
    """Whether the loss rose at once, and is not expected back: a climb is a divergence."""
    is_late = spike.last - spike.step >= UNRECOVERED_STEPS
    return is_late and spike.is_abrupt and spike.is_high and not validates(window, spike.step + UNRECOVERED_STEPS)


def validates(window: Window, since: int) -> bool:
    """Whether an evaluation since that step says that the model is about as good as ever."""
    losses = [
        (record["step"], loss) for record in window.evaluations if (loss := number_of(record, "loss")) is not None
    ]
    if len(losses) < 2 or losses[-1][0] < since:
        return False
    return losses[-1][1] < min(loss for _, loss in losses[:-1]) + VALIDATION_RISE


def _is_sure(window: Window, spike: Spike) -> bool:
    """Whether the loss is not that of hard data: it is too high for too long, or an evaluation is as bad."""
    is_evaluated = any(record["step"] >= spike.step + UNRECOVERED_STEPS for record in window.evaluations)
    return is_evaluated or spike.last - spike.step >= SURE_STEPS or spike.after - spike.usual >= SURE_RISE


def _unrecovered(window: Window, spike: Spike) -> Finding:
    return Finding(
        "spike_unrecovered",
        "critical" if _is_sure(window, spike) else "warning",
        window.step,
        spike.step,
        f"the loss rose from {spike.usual:.3f} (σ {spike.sigma:.3f}) to {spike.peak:.3f} at step {spike.peak_step} and "
        f"is {spike.after:.3f} at step {window.step}. {window.names_data(spike.step)}",
        "a batch of odd data or a too large update threw the weights off, and the loss did not come back",
        "go back to the checkpoint before the spike and leave that data out: rollback.after_steps = 3 does it; "
        "if it comes again, lower optimizer.learning_rate or optimizer.max_grad_norm",
        SPIKE_REFERENCE + "; PaLM (arXiv 2204.02311, 5.1) restarts 100 steps before and skips 200 to 500 batches",
    )


def _recovered(window: Window, back: list[Spike]) -> Finding:
    worst = max(back, key=lambda spike: spike.peak - spike.usual)
    many = f"{len(back)} spikes; the highest: " if len(back) > 1 else ""
    return Finding(
        "spike",
        "note",
        window.step,
        worst.step,
        f"{many}the loss rose from {worst.usual:.3f} (σ {worst.sigma:.3f}) to {worst.peak:.3f} at step "
        f"{worst.peak_step} and was back at step {worst.recovered}. {window.names_data(worst.step)}",
        "odd data in the batch, or an update that was too large for the place",
        "look at the data of that step; if spikes become more frequent, lower optimizer.learning_rate",
        SPIKE_REFERENCE,
    )


def divergence(window: Window) -> list[Finding]:
    """The loss of the recent steps is far above that of the steps before, and validation does not deny it."""
    means, spike = _means(window), window.spikes.current
    is_early = spike is not None and spike.is_abrupt and not _is_sure(window, spike)
    is_early |= spike is not None and spike.is_abrupt and spike.last - spike.step < UNRECOVERED_STEPS
    if len(means) < DIVERGED_BEFORE + 1 or is_early:
        return []
    (_, now), before = means[-1], means[-1 - max(DIVERGED_BEFORE, len(means) // 2) : -1]
    usual = statistics.median(mean for _, mean in before)
    spread = statistics.median(abs(later - early) for (_, early), (_, later) in pairwise(before))
    latest = window.numbers("loss", DIVERGED_LATEST)
    lower = min(now, math.fsum(latest) / len(latest)) if latest else now
    if lower - usual < max(DIVERGED_RISE, DIVERGED_SPREADS * spread):
        return []
    best, step = min((mean, first) for first, mean in means)
    since = next((first for first, mean in reversed(means) if mean <= usual), step) + DIVERGED_STEPS
    if spike is not None and spike.is_abrupt and spike.last == window.step:
        since = spike.step
    if validates(window, since):
        return []
    return [
        Finding(
            "divergence",
            "critical",
            window.step,
            min(since, window.step),
            f"the mean loss of the last {DIVERGED_STEPS} steps is {now:.3f}, {now - usual:.2f} nats above the usual "
            f"{usual:.3f} before (best: {best:.3f} from step {step} on)",
            "the training became unstable: a learning rate too high for this phase, growing logits, or other data",
            "go back to a checkpoint before it with a lower optimizer.learning_rate, a longer warm-up or "
            "model.use_qk_norm = true in a new run",
            DIVERGED_REFERENCE,
        )
    ]


def _means(window: Window) -> list[tuple[int, float]]:
    """The first step and the mean loss of stretches of `DIVERGED_STEPS` steps or more, the last one up to now.

    The blocks of the history and the recent steps are cut from behind. Steps before the last half of the run's are
    left out where the loss still falls fast, and those of another mixture of data.
    """
    found: list[tuple[int, float]] = []
    total, count = 0.0, 0
    for block, mean in reversed(window.history.means("loss")):
        if block.first <= window.mixture_step:
            break
        total += mean * block.numbers["loss"].count
        count += block.numbers["loss"].count
        if count >= DIVERGED_STEPS:
            found.append((block.first, total / count))
            total, count = 0.0, 0
    return found[::-1]


def rising(window: Window) -> list[Finding]:
    """Project 828's red flag: a loss that rises over 5,000 steps."""
    groups = _groups(window, RISING_STEPS, RISING_BLOCKS)
    if len(groups) < RISING_BLOCKS:
        return []
    means = [mean for _, mean in groups]
    if means[-1] - means[0] < RISING_NATS or any(later < before for before, later in pairwise(means)):
        return []
    since = groups[0][0]
    return [
        Finding(
            "loss_rising",
            "warning",
            window.step,
            since,
            f"the loss rose from {means[0]:.3f} around step {since} to {means[-1]:.3f} at step {window.step}, "
            f"over {window.step - since:,} steps",
            "the data changed for the worse, or the learning rate is too high for this phase",
            "look at the data of these steps (p828 batch) and at the sources' shares; lower optimizer.learning_rate",
            'Project 828, red flags: "Loss increases for >5K steps: check data pipeline"',
        )
    ]


def _groups(window: Window, steps: int, groups: int) -> list[tuple[int, float]]:
    """The first step and the mean loss of each of `groups` equal parts of the last `steps` steps."""
    begin = window.step - steps
    found: list[list[tuple[Block, float]]] = [[] for _ in range(groups)]
    for block, mean in window.history.means("loss"):
        if block.first > begin:
            found[min((block.first - begin - 1) * groups // steps, groups - 1)].append((block, mean))
    if window.history.steps_a_block * groups > steps or not window.history.blocks:
        return []
    if window.history.blocks[0].first > begin + 1:
        return []
    return [
        (members[0][0].first, math.fsum(mean for _, mean in members) / len(members)) for members in found if members
    ]


def validation_gap(window: Window) -> list[Finding]:
    """Project 828's red flag: a validation loss far above the training loss, and not the best one."""
    gaps = list(window.gaps)[-GAP_EVALUATIONS:]
    if len(gaps) < GAP_EVALUATIONS or any(gap.validation - gap.training < GAP_NATS for gap in gaps):
        return []
    last, best = gaps[-1], min(gap.validation for gap in window.gaps)
    if last.validation < best + GAP_WORSE:
        return []
    epoch = window.recent[-1].get("epoch")
    return [
        Finding(
            "validation_gap",
            "warning",
            window.step,
            gaps[0].step,
            f"the validation loss of step {last.step} is {last.validation:.3f} (best {best:.3f}), the training loss "
            f"around it {last.training:.3f}: {last.validation - last.training:.2f} nats less"
            + (f", in epoch {epoch + 1}" if isinstance(epoch, int) else ""),
            "the model learns its training data by heart, or the validation text is of another kind",
            "more data or fewer epochs; compare what the two sets hold",
            'Project 828, red flags: "Val loss >> train loss: overfitting"',
        )
    ]
