"""Bytes that cross a GPU's links in a step, by ZeRO stage (the table of docs/distributed.md)."""

from typing import NamedTuple

from p828.plan.setup import Setup

FLOAT32 = 4


class LinkBytes(NamedTuple):
    """What one GPU sends in a step. Ring algorithms: (n − 1) / n of what is reduced or gathered, twice for both."""

    reduced: float
    gathered: float
    between_hosts: float = 0.0
    """What a host's GPUs together send to other hosts."""

    @property
    def total(self) -> float:
        return self.reduced + self.gathered


def link_bytes(setup: Setup, parameters: int, accumulation: int) -> LinkBytes:
    """For a model of this many parameters, in steps of `accumulation` micro-batches."""
    if setup.stage is None or setup.ranks == 1:
        return LinkBytes(0, 0)
    share = (setup.shards - 1) / setup.shards * parameters
    weights = setup.computed_bytes
    if setup.is_sharded:  # embedding and head, which are reduced once a step in float32, are not told apart
        reduced = FLOAT32 if setup.stage == 1 else weights * accumulation
        found = LinkBytes(reduced * share, weights * share * (2 * accumulation if setup.stage == 3 else 1))
        return _with_hosts(found, setup, parameters)
    if setup.stage == 0:
        found = LinkBytes(2 * FLOAT32 * share, 0)
    else:
        reduced = weights * accumulation if setup.reduces_by_hooks else FLOAT32
        # Stage 3 gathers for the forward pass and, unless all weights may stay, again for the backward pass.
        passes = 2 if parameters > setup.live_numbers else 1
        found = LinkBytes(reduced * share, weights * share * (accumulation * passes if setup.stage == 3 else 1))
    return found._replace(between_hosts=found.total if setup.hosts > 1 else 0)


def _with_hosts(found: LinkBytes, setup: Setup, parameters: int) -> LinkBytes:
    """Of the sharded engine.

    A ring of all ranks crosses a host's link once either way. An exchange crosses it from each of the host's ranks to
    every rank elsewhere. Replicas sum their gradients' shards, in float32, each over a ring of hosts.
    """
    if setup.hosts == 1:
        return found
    if setup.replicas > 1:
        summed = 2 * (setup.hosts - 1) / setup.hosts * FLOAT32 * parameters
        return LinkBytes(found.reduced + summed / setup.shards, found.gathered, summed)
    of_host = setup.ranks // setup.hosts
    crossing = 1 if setup.stage == 1 else of_host * (setup.ranks - of_host) / (setup.ranks - 1)
    return found._replace(between_hosts=crossing * found.reduced + found.gathered)
