"""The largest micro-batch that a card has room for."""

import dataclasses

from p828.config import Config
from p828.plan.peak import peak
from p828.plan.setup import Setup

MOST_SEQUENCES = 2**16  # of a micro-batch, beyond which no card has room and nobody asks


def largest_micro_batch(config: Config, setup: Setup, memory_bytes: float) -> int:
    """Sequences of the largest micro-batch with which training, evaluation included, takes so much; 0 for none."""

    def fits(micro_batch_size: int) -> bool:
        return peak(config, setup, micro_batch_size).total <= memory_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_SEQUENCES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def recomputing(config: Config) -> Config:
    """The same with `train.gradient_checkpointing`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=True))
