"""The collective operations of sharding, started and not waited for; on one rank there is nothing to do.

On a GPU an operation waits for what the current stream was given before it, and runs beside what it is given after it,
until the current stream waits for the operation.
"""

import torch.distributed as dist
from torch import Tensor

from p828.engine.sharded.mesh import Mesh

# PyTorch 2.13 renamed them. Functions are looked up at each call, so that `bench.collectives` can count.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def start_gather(flat: Tensor, shard: Tensor, mesh: Mesh) -> dist.Work | None:
    """Begin to fill `flat` with all shards of a replica, end to end. `shard` may be this rank's part of `flat`."""
    if mesh.shards > 1:
        return getattr(dist, _GATHER)(flat, shard, group=mesh.shard_group, async_op=True)
    if shard.data_ptr() != flat.data_ptr():
        flat.copy_(shard)
    return None


def start_exchange(received: Tensor, sent: Tensor, mesh: Mesh) -> dist.Work | None:
    """Begin to send part s of `sent` to the replica's rank with shard s, and to receive this rank's part of each."""
    if mesh.shards > 1:
        return dist.all_to_all_single(received, sent, group=mesh.shard_group, async_op=True)
    received.copy_(sent)
    return None


def start_scatter(flat: Tensor, mesh: Mesh) -> dist.Work | None:
    """Begin to sum `flat` over a replica's ranks. Each gets its shard, in place; the rest of `flat` is undefined."""
    if mesh.shards == 1:
        return None
    own = flat.chunk(mesh.shards)[mesh.shard]
    return getattr(dist, _SCATTER)(own, flat, group=mesh.shard_group, async_op=True)


def start_sum_of_replicas(shard: Tensor, mesh: Mesh) -> dist.Work | None:
    """Begin to sum a shard over replicas, in place. All of them get the same bits."""
    if mesh.replicas == 1:
        return None
    return dist.all_reduce(shard, group=mesh.replica_group, async_op=True)


def start_sum_of_ranks(tensor: Tensor, mesh: Mesh) -> dist.Work | None:
    """Begin to sum over all ranks, in place."""
    return dist.all_reduce(tensor, async_op=True) if mesh.ranks > 1 else None
