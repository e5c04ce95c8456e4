"""What a resume changes about the steps to come, a line each."""

from p828.config import Config
from p828.optim.schedule import learning_rate

A_JUMP = 0.05  # of the larger one of two learning rates


def changed_rows(config: Config, size: int, before: Config, ranks: int) -> list[str]:
    """Whether a step has as many rows as with the configuration before, on another number of ranks."""
    rows_before = before.train.micro_batch_size * before.train.gradient_accumulation * ranks
    now = config.train
    rows = now.micro_batch_size * now.gradient_accumulation * size
    if ranks == size or rows == rows_before:
        return []
    accumulation, rest = divmod(rows_before, now.micro_batch_size * size)
    text = f"ranks = {ranks}, now {size}: a step had {rows_before:,} rows, and has {rows:,}"
    return [text + (f"; --train.gradient-accumulation {accumulation} keeps that" if not rest else "")]


def changed_rate(config: Config, step: int, before: Config) -> list[str]:
    """Whether the learning rate jumps after `step`, as the schedule is drawn anew over other steps or of another kind.

    `before` is the configuration of the checkpoint of that step. A change of `optimizer.learning_rate` alone is
    what the user wants, and is not told.
    """
    if step >= config.train.steps:
        return []
    steps, schedule = before.train.steps, before.schedule
    if (steps, schedule) == (config.train.steps, config.schedule):
        return []
    was = learning_rate(
        min(step, steps - 1), steps, before.optimizer.learning_rate, schedule
    )  # after the last step, that step's
    now = learning_rate(step, config.train.steps, config.optimizer.learning_rate, config.schedule)
    # By the schedule alone: the rest is another optimizer.learning_rate.
    as_was = learning_rate(min(step, steps - 1), steps, config.optimizer.learning_rate, schedule)
    if any(abs(now - rate) <= A_JUMP * max(now, rate) for rate in (was, as_was)):
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
