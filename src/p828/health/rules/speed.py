"""Rules about where a step's time goes."""

import math
import statistics
from collections.abc import Sequence

from p828.health.finding import Finding
from p828.health.window import Record, Window, list_of, number_of

STEPS = 32
STARVED = 0.2  # of the step's time; p828 reads up to eight micro-batches ahead, so that none is waited for
STARVED_SECONDS = 0.01  # shorter waits are the thread's own
HOST_BOUND = 0.3  # of the step's time in which the device is not at work
COMPILING_STEPS = 3
SETTLED_AFTER = 4  # steps of a start, in which layers are compiled for every shape
# Steps from a start's first one on, each of which compiles: the first makes all graphs, and the second may make some
# again for a number that has changed, a variable from then on. A third one's number changes in every step.
BEGUN_COMPILING = 3
SUMMING = 0.5  # of a step; of n ranks one alone is faster if they sum for more than (n - 1) / n of it
SUMMING_SECONDS = 0.01  # shorter sums are the processes' own
SLOW_MFU = 0.01  # of the GPUs' peak; one GPU alone has 0.1 and more
SLOW_SECONDS = 2.0  # a step
ROW = "Project 828: two GPUs over NODE made 0.01 steps a second, one alone 12"


def starved(window: Window) -> list[Finding]:
    """The run waits for data."""
    waits = _pairs(window, "data_seconds")
    if len(waits) < STEPS:
        return []
    waits = sorted(waits)[:-1]  # the longest may be that of the start, or of a shard that is opened
    total = math.fsum(wait for wait, _ in waits)
    wait, share = total / len(waits), total / math.fsum(seconds for _, seconds in waits)
    if share < STARVED or wait < STARVED_SECONDS:
        return []
    return [
        Finding(
            "data_starved",
            "warning",
            window.step,
            window.step - STEPS + 1,
            f"{share:.0%} of a step is spent waiting for its batches ({wait * 1000:.0f} ms; mean of {STEPS} steps)",
            "reading or tokenizing is slower than training",
            "prepare the data (p828 prepare), deal it to more data.streams, or move it to a faster disk",
            "PyTorch's performance tuning guide: data is loaded while the device computes, so the "
            "wait should be near 0",
        )
    ]


def host_bound(window: Window) -> list[Finding]:
    """The device waits for the host, or a CPU does other things than the model."""
    gaps = _pairs(window, "host_seconds")
    if len(gaps) < STEPS:
        return []
    share = statistics.median(gap / all_ for gap, all_ in gaps)
    waits = _pairs(window, "data_seconds")
    for_data = statistics.median(wait / all_ for wait, all_ in waits) if waits else 0.0
    if share - for_data < HOST_BOUND:
        return []
    return [
        Finding(
            "host_bound",
            "warning",
            window.step,
            window.step - STEPS + 1,
            f"the device is not at work on the model for {share:.0%} of a step (median of {STEPS} steps), "
            f"{for_data:.0%} of it for data",
            "something in the loop is slow, as a display or a file on a network's disk; or a GPU runs kernels faster "
            "than the host launches them: small micro-batches, no compilation",
            "py-spy dump --pid shows where the process is; on a GPU a larger train.micro_batch_size with less "
            'train.gradient_accumulation, and train.compile = "on"',
            "PyTorch's performance tuning guide; p828's own steps leave an H100 idle for a few percent",
        )
    ]


def _pairs(window: Window, name: str) -> list[tuple[float, float]]:
    """The number and the step's seconds, of the last steps of this start that have both."""
    pairs = ((number_of(record, name), number_of(record, "seconds")) for record in window.since_resume()[-STEPS:])
    return [(number, seconds) for number, seconds in pairs if number is not None and seconds]


def recompiling(window: Window) -> list[Finding]:
    """Graphs are compiled again and again."""
    started = window.resumed_at or 0
    recent, first = _compiling(window.since_resume()), _compiling(window.first)
    found = [(step, count) for step, count in recent if step > started + SETTLED_AFTER]
    when = f"after the first {SETTLED_AFTER}"
    if len(found) < COMPILING_STEPS:
        found = [(step, count) for step, count in {**dict(first), **dict(recent)}.items() if step > started]
        when = "from the first one on"
        if sum(step <= started + BEGUN_COMPILING for step, _ in found) < BEGUN_COMPILING:
            return []
    return [
        Finding(
            "recompiling",
            "warning",
            window.step,
            found[0][0],
            f"{math.fsum(count for _, count in found):.0f} graphs were compiled in {len(found)} steps {when}, the "
            f"last in step {found[-1][0]}",
            "a shape or a Python value in the layers changes from step to step",
            'keep shapes fixed, or train.compile = "off"; TORCH_LOGS=recompiles names what changed',
            "torch.compile's documentation: every new shape or guard is a recompilation, and after 8 it gives up",
        )
    ]


def _compiling(records: Sequence[Record]) -> list[tuple[int, float]]:
    """The steps that compiled, and how many graphs."""
    return [(record["step"], count) for record in records if (count := number_of(record, "compilations"))]


def links(window: Window) -> list[Finding]:
    """Several GPUs are slowed down by the links between them."""
    started = window.resumed_at or 0
    said = [event for event in window.events if event.get("event") == "slow_link" and event["step"] >= started]
    if said:
        text = " ".join(str(event.get("text", "")) for event in said)
        return [_slow(window, said[0]["step"], text)]
    ranks = len(list_of(window.recent[-1], "rank_memory_bytes"))
    seconds = [n for r in window.since_resume()[-STEPS:] if (n := number_of(r, "seconds")) is not None]
    if ranks < 2 or len(seconds) < STEPS // 2:
        return []
    step, mfus = statistics.median(seconds), window.numbers("mfu", STEPS)
    if text := _summing(window, ranks, step):
        return [_slow(window, started + 1, text)]
    if len(mfus) < STEPS // 2 or statistics.median(mfus) >= SLOW_MFU or step < SLOW_SECONDS:
        return []
    mfu = f"{statistics.median(mfus):.2%} of their peak"
    text = f"{ranks} GPUs compute at {mfu}, {step:.1f} s a step (median of {STEPS} steps)"
    return [_slow(window, window.step - STEPS + 1, text)]


def _summing(window: Window, ranks: int, step: float) -> str:
    """What the start's measurement of the links says of a step of so many seconds; empty if it is not much."""
    measured = next((event for event in reversed(window.events) if event.get("event") == "links"), {})
    seconds, times = number_of(measured, "all_reduce_seconds"), number_of(measured, "reductions")
    if not seconds or not times or not step:
        return ""
    cost = seconds * times
    if cost < max(SUMMING * step, SUMMING_SECONDS):
        return ""
    kind = f" by {kind}" if isinstance(kind := measured.get("kind_of_link"), str) and kind else ""
    alone = ": one rank alone would be faster" if cost > (ranks - 1) / ranks * step else ""
    return (
        f"summing the gradient over {ranks} ranks{kind} takes {cost:.3g} s, measured at the start, of the {step:.3g} s "
        f"of a step (median of {STEPS} steps){alone}"
    )


def _slow(window: Window, since: int, evidence: str) -> Finding:
    return Finding(
        "slow_links",
        "warning",
        window.step,
        since,
        evidence,
        "summing the gradients over the links between the ranks takes longer than computing them",
        "train on one GPU, or raise train.gradient_accumulation; nvidia-smi topo -m shows the links between GPUs",
        ROW,
    )
