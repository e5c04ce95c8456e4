"""Rules about what a run uses up: memory and disk."""

import itertools
import math
import statistics

from p828.files import shown_bytes
from p828.health.finding import Finding
from p828.health.window import Record, Window

FEWEST = 128  # steps of a start, in whose first ones caches fill
SETTLED = 0.25  # first part of the run, in which caches and the allocator fill
GROUPS = 8
RISES = 6  # of the steps from group to group, of which there are 7: by chance in 6 % of runs that do not grow
GROWTH, GROWTH_BYTES = 0.1, 64e6  # since the settled part began; what a process of any size gains while caches fill
RANK_GROWTH = 0.2  # of one rank, over that of the median rank
LATE = 0.15  # of it in the last third: what has filled stays
MEMORY_REFERENCE = "Mann 1945, Kendall: a trend test on the order of groups; peak memory of equal steps stays the same"

ROOM = 1.1  # of a checkpoint: files beside it
FALLEN = 0.05  # of the free bytes at first that must be gone before the trend counts


def memory(window: Window) -> list[Finding]:
    """Memory that grows from step to step."""
    return _ranks(window) or _growth(window)


def _growth(window: Window) -> list[Finding]:
    blocks = window.history.means("memory_bytes")
    first = (window.resumed_at or 0) + 1
    settled = first + SETTLED * (window.step - first)
    values = [(block.first, block.numbers["memory_bytes"].newest) for block, _ in blocks if block.first >= settled]
    if window.step - first < FEWEST or len(values) < 2 * GROUPS:
        return []
    size = len(values) / GROUPS
    ends = [values[min(math.ceil((group + 1) * size), len(values)) - 1][1] for group in range(GROUPS)]
    begin, end = values[0][1], ends[-1]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(ends))
    late = (end - ends[GROUPS * 2 // 3]) / max(end - begin, 1)
    if rises < RISES or late < LATE or end - begin < max(GROWTH * begin, GROWTH_BYTES):
        return []
    steps = window.step - values[0][0]
    return [
        Finding(
            "memory_growth",
            "warning",
            window.step,
            values[0][0],
            f"the peak memory grew from {shown_bytes(begin)} at step {values[0][0]} to {shown_bytes(end)} at step "
            f"{window.step}, in "
            f"{rises} of {GROUPS - 1} parts of these steps: "
            f"{shown_bytes((end - begin) / steps * 1000)} every 1,000 steps",
            "something is kept from every step: tensors in a list, a graph that is not freed, or growing fragmentation",
            "keep numbers and not tensors (.item()); on a GPU torch.cuda.memory._record_memory_history shows who asks",
            MEMORY_REFERENCE,
        )
    ]


def _ranks(window: Window) -> list[Finding]:
    """One rank's memory grows, and the others' does not."""
    rows = [record for record in window.since_resume() if isinstance(record.get("rank_memory_bytes"), list)]
    rows = rows[int(SETTLED * len(rows)) :]
    if len(rows) < FEWEST // 4:
        return []
    before, after = rows[0]["rank_memory_bytes"], rows[-1]["rank_memory_bytes"]
    if len(before) != len(after) or len(before) < 2 or min(before) <= 0:
        return []
    growth = [late / early - 1 for early, late in zip(before, after, strict=True)]
    rank = max(range(len(growth)), key=lambda rank: growth[rank])
    if growth[rank] - statistics.median_low(growth) < RANK_GROWTH:
        return []
    return [
        Finding(
            "memory_growth",
            "warning",
            window.step,
            rows[0]["step"],
            f"the peak memory of rank {rank} grew from {shown_bytes(before[rank])} to {shown_bytes(after[rank])} "
            f"between steps {rows[0]['step']} and {rows[-1]['step']}, "
            f"that of the others by {statistics.median_low(growth):.0%}",
            "this rank gets more of the load: longer rows, or experts that more tokens choose",
            "balance the experts (balance.update_rate), and give the ranks rows of equal length",
            "ranks with equal work use equal memory; the largest decides whether the run fits",
        )
    ]


def disk(window: Window) -> list[Finding]:
    """A disk that will be full before the run ends, or has no room for the next checkpoints."""
    failed = [event for event in window.events if event.get("event") == "not_saved" and _has_no_room(event)]
    if failed:
        return [_filling(window, failed[-1]["step"], f"a checkpoint was not saved: {failed[-1].get('text')}")]
    found = window.disk
    needed = ROOM * found.checkpoint_bytes if found is not None else 0.0
    values = [
        (block.last, block.numbers["disk_free_bytes"].newest) for block, _ in window.history.means("disk_free_bytes")
    ]
    known = [value for _, value in values[-1:]]
    if found is not None and found.free_bytes is not None and found.is_locked:
        known.append(float(found.free_bytes))
    if not known or window.facts.steps <= window.step:
        return []
    free = shown_bytes(min(known))
    if needed and min(known) < needed:
        what = f"{free} are free at step {window.step}, and the next checkpoint takes {shown_bytes(needed)}"
        return [_filling(window, window.step, what)]
    more = _checkpoints_to_come(window)
    if needed and min(known) < more * needed:
        what = f"{free} are free, and {more} more checkpoints that are kept take {shown_bytes(more * needed)}"
        return [_filling(window, window.step, what, is_full=False)]
    return _trend(window, values, needed)


def _has_no_room(event: Record) -> bool:
    return "space" in str(event.get("text")) or "quota" in str(event.get("text")).lower()


def _checkpoints_to_come(window: Window) -> int:
    """How many checkpoints there will be on the disk beyond those that there are, at most at a time."""
    facts, have = window.facts, len(window.disk.checkpoints) if window.disk is not None else 0
    saves = (facts.steps - window.step) // max(facts.checkpoint_every, 1) + 1
    return max(min(facts.keep_last + 1, have + saves) - have, 0)


def _trend(window: Window, values: list[tuple[int, float]], needed: float) -> list[Finding]:
    """What a straight line through the free bytes says of the steps to come."""
    if len(values) < 2:
        return []
    (begin, first), (end, last) = values[0], values[-1]
    used, left = first - last, window.facts.steps - window.step
    if end == begin or used <= 0 or used < FALLEN * first:
        return []
    per_step = used / (end - begin)
    if per_step * left < last - needed:
        return []
    full = end + (last - needed) / per_step
    what = (
        f"{shown_bytes(first)} were free at step {begin} and {shown_bytes(last)} at step {end}: at "
        f"{shown_bytes(per_step)} a step there "
        f"is no room from step {full:,.0f} on, before the last step {window.facts.steps:,}"
    )
    return [_filling(window, begin, what, is_full=False)]


def _filling(window: Window, since: int, evidence: str, is_full: bool = True) -> Finding:
    return Finding(
        "disk_filling",
        "critical" if is_full else "warning",
        window.step,
        since,
        evidence,
        "checkpoints, or something else on that disk, take more than it has",
        "free space, lower checkpoint.keep_last, or move runs_dir to a larger disk; a run that is "
        "stopped goes on from its "
        "newest checkpoint",
        "a straight line through the free bytes of the records; a new checkpoint is written before "
        "an old one is deleted",
    )
