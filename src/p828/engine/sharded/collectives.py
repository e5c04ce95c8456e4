"""The collective operations of sharding, started and not waited for; on one rank there is nothing to do.

On a GPU an operation waits for what the current stream was given before it, and runs beside what it is given after it,
until the current stream waits for the operation.
"""

import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed them. Functions are looked up at each call, so that `bench.collectives` can count.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def start_gather(flat: Tensor, shard: Tensor) -> dist.Work | None:
    """Begin to fill `flat` with all ranks' shards, end to end. `shard` may be this rank's part of `flat`."""
    if dist.get_world_size() > 1:
        return getattr(dist, _GATHER)(flat, shard, async_op=True)
    if shard.data_ptr() != flat.data_ptr():
        flat.copy_(shard)
    return None


def start_exchange(received: Tensor, sent: Tensor) -> dist.Work | None:
    """Begin to send rank r part r of `sent`, and to receive this rank's part of every rank's, end to end."""
    if dist.get_world_size() > 1:
        return dist.all_to_all_single(received, sent, async_op=True)
    received.copy_(sent)
    return None


def start_scatter(flat: Tensor) -> dist.Work | None:
    """Begin to sum `flat` over ranks. Each gets its shard of the sums, in place; the rest of `flat` is undefined."""
    size = dist.get_world_size()
    if size == 1:
        return None
    return getattr(dist, _SCATTER)(flat.chunk(size)[dist.get_rank()], flat, async_op=True)
