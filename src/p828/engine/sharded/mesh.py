"""Which ranks share a set of shards, and which have the same shard of other sets.

Usually all ranks share one set. With `shard_within = "host"` every host has a replica of the model, sharded over its
ranks: hybrid sharding in PyTorch's FSDP (arXiv 2304.11277, section 3.2.2), and near to MiCS (arXiv 2205.00119). What
every micro-batch gathers and sends then stays within a host, and hosts sum the shards of gradients once a step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from p828.config import ShardedConfig
from p828.distributed.group import ProcessGroup
from p828.distributed.launcher import launched
from p828.errors import ConfigError


class Mesh(NamedTuple):
    """A rank's place: rank r has shard r modulo `shards`, in replica r // `shards`."""

    shards: int = 1
    """Ranks that share a replica."""
    shard: int = 0
    replicas: int = 1
    replica: int = 0
    shard_group: dist.ProcessGroup | None = None
    """The ranks of this replica; None for PyTorch's default group, of all ranks."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that have this shard; None where there is one replica."""

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas


def mesh_of(config: ShardedConfig, ranks: ProcessGroup) -> Mesh:
    """The mesh that the configuration asks for; all ranks must call it. Raises ConfigError as `shards_of`."""
    shards = shards_of(config, ranks)
    if shards == ranks.size:
        return Mesh(ranks.size, ranks.rank)
    replica, shard = divmod(ranks.rank, shards)
    of_replicas = [range(first, first + shards) for first in range(0, ranks.size, shards)]
    of_shards = [range(first, ranks.size, shards) for first in range(shards)]
    return Mesh(
        shards, shard, ranks.size // shards, replica, _own_group(of_replicas, ranks), _own_group(of_shards, ranks)
    )


def _own_group(members: Sequence[range], ranks: ProcessGroup) -> dist.ProcessGroup:
    """A group for each of `members`, which every rank must make, and of these this rank's."""
    groups = [dist.new_group(list(one), timeout=ranks.timeout) for one in members]
    return next(group for one, group in zip(members, groups, strict=True) if ranks.rank in one)


def shards_of(config: ShardedConfig, ranks: ProcessGroup) -> int:
    """How many ranks share a replica: all, or those of each host by what the launcher says; all ranks must call it.

    Raises ConfigError, on all ranks, as `ranks_of_a_host`.
    """
    if config.shard_within == "all" or ranks.size == 1:
        return ranks.size
    process = launched()
    places = [(int(rank), int(size)) for rank, size in ranks.all_gather([process.local_rank, process.local_size])]
    try:
        return ranks_of_a_host(places)
    except ConfigError as error:
        raise ranks.on_all_ranks(error) from None


def ranks_of_a_host(places: Sequence[tuple[int, int]]) -> int:
    """How many ranks each host has, from every rank's number on its host and the number of ranks there, 0 if unknown.

    Raises ConfigError where hosts have different numbers of ranks, or ranks are not numbered host by host.
    """
    accepted = 'sharded.shard_within = "host": accepted'
    sizes = sorted({size for _, size in places})
    if sizes[0] == 0:
        raise ConfigError(f"{accepted} where the launcher sets LOCAL_WORLD_SIZE, as torchrun does")
    if len(sizes) > 1:
        found = " and ".join(map(str, sizes))
        raise ConfigError(f"{accepted} with the same number of processes on every host, not with {found}")
    if len(places) % sizes[0]:
        raise ConfigError(f"{accepted} with {sizes[0]} processes on every host, not with {len(places)} in all")
    if [rank for rank, _ in places] != [rank % sizes[0] for rank in range(len(places))]:
        raise ConfigError(f"{accepted} where processes are numbered host by host, as torchrun does")
    return sizes[0]
