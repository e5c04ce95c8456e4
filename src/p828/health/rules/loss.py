"""Rules about the loss: spikes, divergence, a loss that rises, and how far validation is above training."""

import math
from itertools import pairwise

from p828.health.finding import Finding
from p828.health.history import Block
from p828.health.spikes import Spike
from p828.health.window import Window, number_of

UNRECOVERED_STEPS = 32  # PaLM (arXiv 2204.02311, 5.1): most spikes come back by themselves, within some dozens of steps
SPIKE_REFERENCE = "OLMo-core, SkipStepOptimizer: a loss above mean + 6 standard deviations of the last 128 steps"

DIVERGED_STEPS = 48  # recent steps whose mean counts
DIVERGED_RISE = 0.5  # nats above the best mean of as many steps
DIVERGED_SIGMAS = 4.0  # and more than the noise of the loss explains: of the recent steps' standard deviation
DIVERGED_REFERENCE = (
    "Wortsman et al. 2023 (arXiv 2309.14322): a loss that rises above its minimum and stays there has diverged; "
    "0.5 nats is a perplexity 1.6 times as high"
)

RISING_STEPS = 5_000  # Project 828: "Loss increases for >5K steps: check data pipeline"
RISING_BLOCKS = 5
RISING_NATS = 0.05  # over these steps; less is what data in another order gives

GAP_NATS = 1.0  # Project 828: "Val loss >> train loss"; e times the perplexity
GAP_STEPS = 64


def spikes(window: Window) -> list[Finding]:
    """`spike_unrecovered` for a spike that did not come back, else `spike` for those that did."""
    current, found = window.spikes.current, []
    if current is not None and current.last - current.step >= UNRECOVERED_STEPS:
        found.append(_unrecovered(window, current))
    back = [spike for spike in window.spikes.found if spike.recovered is not None]
    if back:
        found.append(_recovered(window, back))
    return found


def _unrecovered(window: Window, spike: Spike) -> Finding:
    return Finding(
        "spike_unrecovered",
        "critical",
        window.step,
        spike.step,
        f"the loss rose from {spike.usual:.3f} (σ {spike.sigma:.3f}) to {spike.peak:.3f} at step {spike.peak_step} and "
        f"is {spike.after:.3f} at step {window.step}. {_names_data(window, spike)}",
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
        f"{worst.peak_step} and was back at step {worst.recovered}. {_names_data(window, worst)}",
        "odd data in the batch, or an update that was too large for the place",
        "look at the data of that step; if spikes become more frequent, lower optimizer.learning_rate",
        SPIKE_REFERENCE,
    )


def _names_data(window: Window, spike: Spike) -> str:
    return f"Its data: p828 batch {window.facts.run} --step {spike.step}"


def divergence(window: Window) -> list[Finding]:
    """The loss of the recent steps is far above the best that the run had."""
    recent = window.numbers("loss", DIVERGED_STEPS)
    if len(recent) < DIVERGED_STEPS:
        return []
    mean = math.fsum(recent) / len(recent)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / len(recent))
    best, step = best_mean(window, DIVERGED_STEPS)
    if mean - best < max(DIVERGED_RISE, DIVERGED_SIGMAS * sigma / math.sqrt(DIVERGED_STEPS)):
        return []
    return [
        Finding(
            "divergence",
            "critical",
            window.step,
            step,
            f"the mean loss of the last {DIVERGED_STEPS} steps is {mean:.3f}, {mean - best:.2f} nats above the best, "
            f"{best:.3f} up to step {step}",
            "the training became unstable: a learning rate too high for this phase, growing logits, or other data",
            "go back to a checkpoint before it with a lower optimizer.learning_rate, a longer warm-up or "
            "model.use_qk_norm = true in a new run",
            DIVERGED_REFERENCE,
        )
    ]


def best_mean(window: Window, steps: int) -> tuple[float, int]:
    """The lowest mean loss over blocks that hold at least `steps` steps together, and their last step."""
    best, at = math.inf, window.step
    blocks = window.history.means("loss")
    total, count, begin = 0.0, 0, 0
    for block, mean in blocks:
        total += mean * block.counts["loss"]
        count += block.counts["loss"]
        while count - blocks[begin][0].counts["loss"] >= steps:
            first, first_mean = blocks[begin]
            total -= first_mean * first.counts["loss"]
            count -= first.counts["loss"]
            begin += 1
        if count >= steps and total / count < best:
            best, at = total / count, block.last
    return best, at


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
    """Project 828's red flag: a validation loss far above the training loss."""
    if not window.evaluations:
        return []
    evaluation = window.evaluations[-1]
    validation, losses = number_of(evaluation, "loss"), window.numbers("loss", GAP_STEPS)
    if validation is None or len(losses) < GAP_STEPS // 2:
        return []
    training = math.fsum(losses) / len(losses)
    if validation - training < GAP_NATS:
        return []
    epochs = window.recent[-1].get("epoch", 0)
    return [
        Finding(
            "validation_gap",
            "warning",
            window.step,
            evaluation["step"],
            f"the validation loss of step {evaluation['step']} is {validation:.3f}, the training loss {training:.3f}: "
            f"{validation - training:.2f} nats less, in epoch {epochs + 1 if isinstance(epochs, int) else '?'}",
            "the model learns its training data by heart, or the validation text is of another kind",
            "more data or fewer epochs; compare what the two sets hold",
            'Project 828, red flags: "Val loss >> train loss: overfitting"',
        )
    ]
