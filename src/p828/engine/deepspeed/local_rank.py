"""LOCAL_RANK as DeepSpeed reads it: as the number of this process's GPU among those that the process sees."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAMES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")  # DeepSpeed wants both to be the same where mpirun sets its own


@contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """Have LOCAL_RANK name `device` in the block. A process that sees its own GPU alone has number 0 on any rank."""
    before = {name: os.environ[name] for name in NAMES if name in os.environ}
    if device.type == "cuda":
        os.environ.update(dict.fromkeys(before, str(device.index)))
    try:
        yield
    finally:
        os.environ.update(before)
