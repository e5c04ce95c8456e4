"""Rules about the machine and a run's directory: disk, checkpoints, hangs, memory, links and compilation."""

import pytest
from windows import (
    RESUME,
    STEPS,
    TWO_RANKS,
    changed,
    event,
    found,
    healthy,
    rules,
    steps,
    window,
)

from p828.health.disk import Disk, Saved
from p828.health.examine import examine


@pytest.mark.parametrize("compiling, expected", [(2, []), (3, ["recompiling"])])
@pytest.mark.parametrize("start", [0, 100])
def test_a_start_that_goes_on_compiling(start: int, compiling: int, expected: list[str]) -> None:
    """PyTorch gives up before the steps in which a sound start does not compile any more."""
    records = steps(lambda r: {"compilations": 2} if start < r["step"] <= start + compiling else {})
    resumed = [*records[:104], RESUME, *records[104:]] if start else records
    assert rules(resumed) == expected


def test_a_disk_is_told_of_before_it_is_full() -> None:
    saved = (Saved(100, 10**9, ""),)
    filling = window(
        steps(lambda r: {"disk_free_bytes": 10**10 - 3 * 10**7 * r["step"]} if r["step"] % 10 == 0 else {})
    )
    filling.disk = Disk(checkpoints=saved)
    (finding,) = examine(filling)
    assert (finding.rule, finding.severity) == ("disk_filling", "warning")
    assert "no room from step 297 on, before the last step 400" in finding.evidence  # (10 GB - 1.1 GB) / 30 MB
    full = window(steps(lambda r: {"disk_free_bytes": 10**9}))
    full.disk = Disk(checkpoints=saved)
    assert [(f.rule, f.severity) for f in examine(full)] == [("disk_filling", "critical")]
    slow = window(steps(lambda r: {"disk_free_bytes": 10**10 - 10**7 * r["step"]}))
    slow.disk = Disk(checkpoints=saved)
    assert examine(slow) == []  # 4 GB in all


@pytest.mark.parametrize(
    "disk, severity",
    [
        (Disk(checkpoints=(Saved(100, 10, ""), Saved(200, 10, "step_00000200: a has 1 bytes of 2"))), "critical"),
        (Disk(checkpoints=(Saved(100, 10, "step_00000100: a has 1 bytes of 2"), Saved(200, 10, ""))), "warning"),
        (Disk(quarantined=("damaged_step_00000100",)), "critical"),
        (Disk(unfinished=(".step_00000200.tmp",)), "note"),
    ],
)
def test_checkpoints_that_are_not_whole(disk: Disk, severity: str) -> None:
    view = window(healthy(STEPS))
    view.disk = disk
    assert [(f.rule, f.severity) for f in examine(view)] == [("half_written_state", severity)]


def test_a_resume_that_does_not_go_on_where_the_run_was() -> None:
    records = [*healthy(100), RESUME, *healthy(STEPS)[104:]]
    assert found(records) == []
    jumped = changed(records, 101, lambda r: {"loss": r["loss"] + 1.5})
    assert rules(jumped)[0] == "half_written_state"


@pytest.mark.parametrize(
    "disk, is_hanging",
    [
        (Disk(is_locked=True, silent_seconds=30), False),
        (Disk(is_locked=True, silent_seconds=300), True),
        (Disk(is_locked=False, silent_seconds=300), False),
        (Disk(hang="no progress for 60 s; the run ends. Where each rank is:"), True),
    ],
)
def test_a_run_that_hangs(disk: Disk, is_hanging: bool) -> None:
    view = window(healthy(STEPS))
    view.disk = disk
    assert [f.rule for f in examine(view)] == ["hang"] * is_hanging


def test_one_rank_of_several_may_grow() -> None:
    even = steps(lambda r: {"rank_memory_bytes": [10**9 + 10**6 * r["step"]] * 4})
    one = steps(lambda r: {"rank_memory_bytes": [10**9, 10**9, 10**9 + 3 * 10**6 * r["step"], 10**9]})
    assert found(even) == []
    (finding,) = found(one)
    assert finding.rule == "memory_growth"
    assert "rank 2" in finding.evidence


def test_several_gpus_that_compute_next_to_nothing() -> None:
    records = steps(lambda r: {"mfu": 0.0004, "seconds": 100.0, **TWO_RANKS})
    assert rules(records) == ["slow_links"]
    assert rules(steps(lambda r: {"mfu": 0.3, "seconds": 100.0, **TWO_RANKS})) == []


@pytest.mark.parametrize(
    "ranks, seconds, expected",
    [(2, 0.02, ""), (2, 0.06, "by NODE takes 0.06 s"), (4, 0.06, "by NODE takes 0.06 s"), (1, 0.06, "")],
)
def test_a_step_that_mostly_sums_gradients(ranks: int, seconds: float, expected: str) -> None:
    """Of two ranks one alone is faster if they sum for more than half of the time, of four for more than 3 / 4."""
    measured = {**event("links", 0), "all_reduce_seconds": seconds / 2, "reductions": 2, "kind_of_link": "NODE"}
    of_ranks = {"seconds": 0.1, "rank_memory_bytes": [10**9] * ranks} if ranks > 1 else {"seconds": 0.1}
    findings = found([measured, *steps(lambda r: of_ranks)])
    assert [finding.rule for finding in findings] == ["slow_links"] * bool(expected)
    if expected:
        assert expected in findings[0].evidence
        assert ("one rank alone would be faster" in findings[0].evidence) is (ranks == 2)


def test_short_sums_say_nothing_of_the_links() -> None:
    measured = {**event("links", 0), "all_reduce_seconds": 0.009, "reductions": 1}
    assert rules([measured, *steps(lambda r: {"seconds": 0.01, **TWO_RANKS})]) == []
