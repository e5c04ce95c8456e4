"""What a resume changes about the steps to come, a line each."""

from typing import Any

from p828.config import Config, ScheduleConfig
from p828.train.schedule import learning_rate

A_JUMP = 0.05  # of the larger one of two learning rates


def changed_rows(config: Config, size: int, state: dict[str, Any]) -> list[str]:
    """Whether a step has as many rows as in the state of a checkpoint from another number of ranks."""
    before, ranks = state["config"]["train"], state.get("ranks", 1)
    rows_before = before["micro_batch_size"] * before["gradient_accumulation"] * ranks
    now = config.train
    rows = now.micro_batch_size * now.gradient_accumulation * size
    if ranks == size or rows == rows_before:
        return []
    accumulation, rest = divmod(rows_before, now.micro_batch_size * size)
    text = f"ranks = {ranks}, now {size}: a step had {rows_before:,} rows, and has {rows:,}"
    return [text + (f"; --train.gradient-accumulation {accumulation} keeps that" if not rest else "")]


def changed_rate(config: Config, step: int, state: dict[str, Any]) -> list[str]:
    """Whether the learning rate jumps after `step`, as the schedule is drawn anew over other steps or of another kind.

    `state` is of the checkpoint of that step. A change of `optimizer.learning_rate` alone is meant so.
    """
    if step >= config.train.steps:
        return []
    before = state["config"]
    steps, schedule = before["train"]["steps"], ScheduleConfig(**before["schedule"])
    if (steps, schedule) == (config.train.steps, config.schedule):
        return []
    peak = before["optimizer"]["learning_rate"]
    was = learning_rate(min(step, steps - 1), steps, peak, schedule)  # after the last step, that step's
    now = learning_rate(step, config.train.steps, config.optimizer.learning_rate, config.schedule)
    if abs(now - was) <= A_JUMP * max(now, was):
        return []
    text = (
        f"the learning rate jumps: {now:.3g} at step {step + 1}, where the checkpoint's settings give {was:.3g}, since "
        f"{schedule.kind} over train.steps = {steps:,} is now {config.schedule.kind} over {config.train.steps:,}."
    )
    warmup = "" if step >= config.schedule.warmup_steps else " --schedule.warmup-steps 0"
    if was > 0:
        text += (
            f" Without a jump: --schedule.kind constant --optimizer.learning-rate {was:.3g}{warmup}. "
            'A run that may be made longer is better begun with schedule.kind = "constant" or "wsd"'
        )
    return [text]
