from typing import Literal

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from p828.config import ScheduleConfig
from p828.optim.schedule import learning_rate

PEAK = 3e-4


def rates(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    warmup = rates(ScheduleConfig(kind="constant", warmup_steps=4), 6)
    assert warmup == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK, PEAK, PEAK])


def test_cosine_agrees_with_transformers_where_both_start_and_end_at_the_same_step() -> None:
    # theirs ends at `num_training_steps`, ours at the last step that is taken; theirs begins at a rate of zero
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=49)
    ours = ScheduleConfig(kind="cosine", warmup_steps=0, min_lr_ratio=0.0)
    for step in range(50):
        assert learning_rate(step, 50, PEAK, ours) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_ends_at_its_lowest_rate() -> None:
    falling = rates(ScheduleConfig(kind="cosine", warmup_steps=10, min_lr_ratio=0.1), 100)
    assert falling[10] == pytest.approx(PEAK)
    assert falling[-1] == pytest.approx(0.1 * PEAK)
    assert falling[10:] == sorted(falling[10:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps, steps", [(0, 1), (0, 2), (5, 6), (5, 7), (5, 40), (1, 2)])
def test_the_last_step_has_the_lowest_rate_and_the_warmup_ends_at_the_peak(
    kind: Literal["cosine", "wsd"], warmup_steps: int, steps: int
) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, decay_steps=1, min_lr_ratio=0.1)
    found = rates(schedule, steps)
    assert found[-1] == pytest.approx(0.1 * PEAK, rel=1e-12)
    assert max(found) == found[warmup_steps - 1] == pytest.approx(PEAK) or not warmup_steps


def test_wsd_falls_in_so_many_equal_parts_below_the_peak() -> None:
    falling = rates(ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.2), 10)
    assert falling[2:6] == pytest.approx([PEAK] * 4)
    assert falling[6:] == pytest.approx([0.8 * PEAK, 0.6 * PEAK, 0.4 * PEAK, 0.2 * PEAK])


def test_wsd_is_stable_then_falls_linearly_as_in_transformers() -> None:
    """Theirs has the lowest rate at step `num_training_steps`, ours at the last one that is taken."""
    ours = rates(ScheduleConfig(kind="wsd", warmup_steps=5, decay_steps=10, min_lr_ratio=0.1), 40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=5, num_stable_steps=24, num_decay_steps=10, decay_type="linear", min_lr_ratio=0.1
    )
    for step in range(40):
        if step >= 5:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_warmup_longer_than_the_run_is_no_error() -> None:
    assert rates(ScheduleConfig(warmup_steps=100), 10)[-1] == pytest.approx(PEAK / 10)
