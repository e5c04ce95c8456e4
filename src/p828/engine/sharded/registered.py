"""Memory that is registered with NCCL, so that a GPU's copy engines move it between ranks.

Gathering weights and exchanging gradients is copying. NCCL's kernels would take multiprocessors for it from the layers
that are computed meanwhile; copy engines take none. NCCL has them copy where both sides of an operation are in memory
that it allocated and all ranks registered together, and where the communicator's policy is to use no thread blocks
(NCCL's user guide, "Zero-CTA optimization"). Elsewhere it goes on with kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from p828.engine.sharded.mesh import Mesh


class RegisteredMemory:
    """What is allocated within `allocating`; keep it as long as its tensors. Elsewhere than on GPUs it does nothing."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._pool: torch.cuda.MemPool | None = None
        import os
        if device.type == "cuda" and mesh.shards > 1 and not os.environ.get("P828_UNREGISTERED"):
            group = dist.group.WORLD if mesh.shard_group is None else mesh.shard_group
            assert group is not None
            dist.barrier(group, device_ids=[device.index])  # which makes the communicator
            self._backend = group._get_backend(device)
            self._pool = torch.cuda.MemPool(self._backend.mem_allocator)

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """All ranks of a replica must allocate the same sizes in the same order."""
        if self._pool is None:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool):
            yield

    def register(self) -> None:
        """To be called by all ranks of a replica, once all has been allocated."""
        if self._pool is not None:
            self._backend.register_mem_pool(self._pool, symm=True)
