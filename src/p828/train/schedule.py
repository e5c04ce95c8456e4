"""Learning rate as a function of the step alone, so that a resume needs no state."""

import math

from p828.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) in a run of `steps`.

    Linear warm-up to the peak, then: `cosine` falls along half a period to `min_lr_ratio` of the peak at the last step;
    `constant` stays; `wsd` stays and falls linearly over the last `decay_steps`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    lowest = peak * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps) / max(steps - 1 - schedule.warmup_steps, 1)
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if schedule.kind == "wsd":
        left = (steps - step) / max(schedule.decay_steps, 1)
        return lowest + (peak - lowest) * min(left, 1.0)
    return peak
