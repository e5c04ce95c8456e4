"""Memory that is registered with NCCL, so that a GPU's copy engines move it between ranks.

Gathering weights and exchanging gradients is copying. NCCL's kernels would take multiprocessors for it from the layers
that are computed meanwhile; copy engines take none. NCCL has them copy where both sides of an operation are in memory
that it allocated and that all ranks registered together, and where NCCL_CTA_POLICY is 2, no thread blocks (NCCL's user
guide, "Zero-CTA optimization").
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from p828.distributed.group import NO_BLOCKS, ProcessGroup
from p828.distributed.launcher import launched
from p828.engine.sharded.mesh import Mesh

FIRST_NCCL = (2, 28)  # that has copy engines gather and exchange


class RegisteredMemory:
    """What is allocated within `allocating`: as any other memory, unless a replica's ranks have copy engines to use."""

    def __init__(self, mesh: Mesh, device: torch.device, ranks: ProcessGroup) -> None:
        """All ranks must make one."""
        self._pool: torch.cuda.MemPool | None = None
        if _has_copy_engines(mesh, device, ranks):
            group = dist.group.WORLD if mesh.shard_group is None else mesh.shard_group
            assert group is not None
            dist.barrier(group, device_ids=[device.index])  # makes the communicator, which registering needs
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
            self._backend.register_mem_pool(self._pool, symm=True)  # type: ignore[attr-defined]


def _has_copy_engines(mesh: Mesh, device: torch.device, ranks: ProcessGroup) -> bool:
    """Whether a replica's ranks are GPUs of one host that reach each other's memory, and NCCL may let them copy."""
    if device.type != "cuda" or mesh.shards == 1:
        return False
    own = (
        torch.cuda.nccl.version()[:2] >= FIRST_NCCL
        and os.environ.get("NCCL_CTA_POLICY") == NO_BLOCKS
        and launched().local_size == mesh.shards
        and not _has_expandable_segments()
        and _reaches_others(device, mesh.shards)
    )
    return all(theirs for (theirs,) in ranks.all_gather([own]))


def _has_expandable_segments() -> bool:
    """Whether the user has PyTorch's memory grow in place: with 2.11 a pool with NCCL's memory then raises."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.lower() for setting in settings)


def _reaches_others(device: torch.device, count: int) -> bool:
    """Whether this process sees the `count` GPUs of its host's ranks, and its own reaches their memory."""
    others = [number for number in range(count) if number != device.index]
    return torch.cuda.device_count() >= count and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
