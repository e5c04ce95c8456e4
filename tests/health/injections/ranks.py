"""Faults 23 and 24 that show on several ranks, or in the loop around the engine; every rank is a process."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Fault, Settings, Strength
from injections.patching import replaced

from p828.engine.sharded import collectives
from p828.engine.sharded.engine import ShardedEngine
from p828.train.log.log import Log

GROWING = 1  # the rank whose memory grows


@contextmanager
def slow_loop(milliseconds: Strength) -> Iterator[None]:
    """After each micro-batch the loop shows how far it is, on a terminal that takes its time: the model waits."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def micro_batch(*arguments: Any) -> None:
            original(*arguments)
            time.sleep(float(milliseconds) / 1000)

        return micro_batch

    with replaced(Log, "micro_batch", make):
        yield


@contextmanager
def slow_links(megabytes_per_second: Strength) -> Iterator[None]:
    """Every collective operation takes as long as its bytes need over a link of this rate, both ways at once."""
    rate = float(megabytes_per_second) * 1e6

    def slowed(crossings: float, size_of: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        """`crossings` of the bytes of the whole tensor, times (n − 1) / n, are sent by each of n ranks."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*arguments: Any, **named: Any) -> Any:
                ranks = dist.get_world_size()
                time.sleep(crossings * (ranks - 1) / ranks * size_of(*arguments).nbytes / rate)
                return original(*arguments, **named)

            return operation

        return make

    operations: list[tuple[str, float, Callable[..., torch.Tensor]]] = [
        ("all_reduce", 2, lambda tensor: tensor),
        ("all_to_all_single", 1, lambda received, sent: sent),
        (collectives._GATHER, 1, lambda flat, shard: flat),
        (collectives._SCATTER, 1, lambda shard, flat: flat),
    ]
    with ExitStack() as stack:
        for name, crossings, size_of in operations:
            stack.enter_context(replaced(dist, name, slowed(crossings, size_of)))
        yield


@contextmanager
def rank_that_grows(megabytes: Strength) -> Iterator[None]:
    """One rank keeps of every step as much as its experts' loads say: so many megabytes for each mean load."""
    kept: list[torch.Tensor] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(engine: ShardedEngine, *arguments: Any, **named: Any) -> Any:
            result = original(engine, *arguments, **named)
            if engine.ranks.rank == GROWING:
                share = max(max(loads) * len(loads) / sum(loads) for loads in result.loads)
                kept.append(torch.ones(int(share * float(megabytes) * 2**18)))
            return result

        return step

    with replaced(ShardedEngine, "step", make):
        yield


def _two_ranks(strength: Strength, corpus: Path) -> Settings:
    """The same batch for both together as one process has."""
    return {"train": {"gradient_accumulation": 1}}


def _short(strength: Strength, corpus: Path) -> Settings:
    """Runs that mostly wait."""
    return {"train": {"steps": 100}}


def _two_ranks_short(strength: Strength, corpus: Path) -> Settings:
    return {"train": {"gradient_accumulation": 1, "steps": 100}}


FAULTS = (
    Fault(
        23, "memory of rank 1 by its load, in MB a step", ("memory_growth",), rank_that_grows, (1.0, 2.0, 4.0),
        settings=_two_ranks, ranks=2, words="rank 1",
    ),
    Fault(24, "slow loop, in ms a micro-batch", ("host_bound",), slow_loop, (40.0, 80.0, 200.0), settings=_short),
    Fault(
        24, "slow links, in MB/s", ("slow_links",), slow_links, (1.0, 4.0, 10.0), settings=_two_ranks_short, ranks=2
    ),
)  # fmt: skip
