"""The learning rate, a function of the step alone, so that a checkpoint holds no state of it."""

import math

from p828.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step`, counted from 0, in a run of `steps` steps.

    A linear warm-up of `warmup_steps` steps ends at the peak. After it, `cosine` falls along half a period, `constant`
    stays at the peak, and `wsd` stays there and falls linearly over the last `decay_steps` steps. At the last step
    `cosine` and `wsd` have `min_lr_ratio` of the peak, even if it is the only step after the warm-up.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    lowest = peak * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        falling = steps - 1 - schedule.warmup_steps
        progress = min((step - schedule.warmup_steps) / falling, 1.0) if falling > 0 else 1.0
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        left = (steps - 1 - step) / max(schedule.decay_steps, 1)
        return lowest + (peak - lowest) * min(max(left, 0.0), 1.0)
    return peak
