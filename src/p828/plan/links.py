"""Bytes that cross a GPU's links in a step, by ZeRO stage (the table of docs/distributed.md)."""

from typing import NamedTuple

from p828.plan.setup import Setup

FLOAT32 = 4


class LinkBytes(NamedTuple):
    """What one GPU sends in a step. Ring algorithms: (n − 1) / n of what is reduced or gathered, twice for both."""

    reduced: float
    gathered: float

    @property
    def total(self) -> float:
        return self.reduced + self.gathered


def link_bytes(setup: Setup, parameters: int, accumulation: int) -> LinkBytes:
    """For a model of this many parameters, in steps of `accumulation` micro-batches."""
    if setup.stage is None or setup.ranks == 1:
        return LinkBytes(0, 0)
    share = (setup.ranks - 1) / setup.ranks * parameters
    weights = setup.computed_bytes
    if setup.is_sharded:  # embedding and head, which are reduced once a step in float32, are not told apart
        reduced = FLOAT32 if setup.stage == 1 else weights * accumulation
        return LinkBytes(reduced * share, weights * share * (2 * accumulation if setup.stage == 3 else 1))
    if setup.stage == 0:
        return LinkBytes(2 * FLOAT32 * share, 0)
    reduced = weights * accumulation if setup.reduces_by_hooks else FLOAT32
    # Stage 3 gathers for the forward pass and, unless all weights may stay, again for the backward pass.
    passes = 2 if parameters > setup.live_numbers else 1
    gathered = weights * (accumulation * passes if setup.stage == 3 else 1)
    return LinkBytes(reduced * share, gathered * share)
