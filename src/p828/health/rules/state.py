"""Rules about what a run has on the disk and goes on from: half-written checkpoints, and runs that hang."""

import math

from p828.health.finding import Finding
from p828.health.window import Window, number_of

BEFORE = 16  # steps before a resume whose mean loss is compared
AFTER = 8  # steps after it
RANGE = 32  # steps before it in which no mean loss was as high: data that is not shuffled well moves so far
JUMP = 0.4  # nats
JUMP_SIGMAS = 6.0  # of the losses before; as a spike
RATE_REFERENCE = (
    "a run that is resumed goes on as if it had not been interrupted; p828 prove-resume shows it bit for bit"
)

SILENT_SECONDS = 60.0  # at least; an evaluation, or a checkpoint that is waited for, is silent, too
SILENT_STEPS = 20  # times the longest of the recent steps
HANG_REFERENCE = "NCCL's own timeout is 10 minutes; a run that is silent for 20 of its steps has not been so before"


def half_written(window: Window) -> list[Finding]:
    """Checkpoints that are not what was written, or a resume that does not go on where the run was."""
    return _damaged(window) or _jumped(window)


def _damaged(window: Window) -> list[Finding]:
    disk = window.disk
    told = [event for event in window.events if "damaged" in str(event.get("event")) or _tells_of_damage(event)]
    bad = [saved for saved in disk.checkpoints if saved.problem] if disk is not None else []
    if disk is not None and bad:
        is_newest = bad[-1] == disk.checkpoints[-1]
        consequence = ", the newest one" if is_newest else ""
        return [
            _written(window, bad[-1].step, f"{bad[-1].problem}{consequence}", "critical" if is_newest else "warning")
        ]
    if disk is not None and disk.quarantined:
        return [
            _written(window, window.step, f"a damaged checkpoint was set aside: {disk.quarantined[-1]}", "critical")
        ]
    if told:
        return [_written(window, told[-1]["step"], str(told[-1].get("text", "")), "critical")]
    if disk is not None and disk.unfinished:
        return [_written(window, window.step, f"a process ended while it wrote {disk.unfinished[-1]}", "note")]
    return []


def _tells_of_damage(event: object) -> bool:
    return isinstance(event, dict) and event.get("event") == "resume" and "is damaged" in str(event.get("text"))


def _written(window: Window, since: int, evidence: str, severity: str) -> Finding:
    return Finding(
        "half_written_state",
        "critical" if severity == "critical" else "warning" if severity == "warning" else "note",
        window.step,
        since,
        evidence,
        "a process or a machine ended while it wrote, or the disk lost what was written",
        "resume: p828 goes on from the newest checkpoint whose checksums hold; look at the disk",
        "a checkpoint is complete or absent: its manifest lists every file's size and SHA-256",
    )


def _jumped(window: Window) -> list[Finding]:
    """The loss after a resume is not that of before."""
    resumed = window.resumed_at
    if resumed is None:
        return []
    losses = [(record["step"], loss) for record in window.recent if (loss := number_of(record, "loss")) is not None]
    before = [loss for step, loss in losses if resumed - BEFORE < step <= resumed]
    after = [loss for step, loss in losses if resumed < step <= resumed + AFTER]
    if len(before) < BEFORE // 2 or len(after) < AFTER // 2:
        return []
    mean, now = math.fsum(before) / len(before), math.fsum(after) / len(after)
    sigma = math.sqrt(math.fsum((loss - mean) ** 2 for loss in before) / len(before))
    if (
        now - mean < max(JUMP, JUMP_SIGMAS * sigma / math.sqrt(len(after)))
        or now < _highest(losses, resumed) + JUMP / 2
    ):
        return []
    return [
        Finding(
            "half_written_state",
            "critical",
            window.step,
            resumed,
            f"the mean loss of the {len(before)} steps before the resume from step {resumed} is "
            f"{mean:.3f}, that of the "
            f"{len(after)} steps after it {now:.3f}",
            "the checkpoint holds a part of the state only: weights, moments or random states of another step, or none",
            "resume from an earlier checkpoint, and compare: p828 prove-resume shows what differs",
            RATE_REFERENCE,
        )
    ]


def _highest(losses: list[tuple[int, float]], resumed: int) -> float:
    """The highest mean of `AFTER` steps in a row among those not long before."""
    before = [loss for step, loss in losses if resumed - RANGE < step <= resumed]
    return max(math.fsum(before[i : i + AFTER]) / AFTER for i in range(len(before) - AFTER + 1))


def hang(window: Window) -> list[Finding]:
    """A run that makes no progress while a process holds it."""
    disk = window.disk
    if disk is None:
        return []
    if disk.hang:
        return [_hanging(window, f"the run's hang.txt says: {disk.hang}")]
    if not disk.is_locked or disk.silent_seconds is None:
        return []
    seconds = window.numbers("seconds", 64)
    limit = max(SILENT_SECONDS, SILENT_STEPS * max(seconds, default=0.0))
    if window.facts.has_tasks or not seconds:
        limit = max(limit, window.facts.hang_seconds)
    if disk.silent_seconds < limit:
        return []
    usual = f"; its recent steps took up to {max(seconds):.3g} s" if seconds else ""
    return [
        _hanging(
            window,
            f"a process holds the run, and no record came for {disk.silent_seconds:,.0f} s after step "
            f"{window.step}{usual}",
        )
    ]


def _hanging(window: Window, evidence: str) -> Finding:
    return Finding(
        "hang",
        "critical",
        window.step,
        window.step,
        evidence,
        "a rank waits for one that has died or is elsewhere, or a read or write does not return",
        "py-spy dump --pid shows where each process is; end them, and the same command goes on from "
        "the newest checkpoint",
        HANG_REFERENCE,
    )
