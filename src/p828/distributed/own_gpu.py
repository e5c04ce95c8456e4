"""The GPU of this rank: which of those that the process sees it is, and that no other rank has it.

A launcher shows all of a host's GPUs to each process, which then takes the one of its LOCAL_RANK. Or it shows each
process a GPU of its own by CUDA_VISIBLE_DEVICES, as SLURM does with --gpus-per-task=1: then that one is number 0
everywhere.
"""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from p828.errors import ConfigError, LocalRankError
from p828.system.device import machine


class Gpu(NamedTuple):
    """A rank's GPU, as the ranks tell them apart."""

    host: tuple[str, str]
    """As `machine` has it."""
    uuid: str


def take_gpu(wanted: str, local_rank: int) -> torch.device:
    """Make this rank's GPU the current one and return it; the CPU where that is `wanted`, or there is no GPU.

    Raises LocalRankError where the process sees too few GPUs.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = gpu_index(local_rank, torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_index(local_rank: int, visible: int) -> int:
    """The number of this rank's GPU among those `visible` to the process; a single one is taken for the rank's own.

    Raises LocalRankError where there are several, and fewer than ranks. Whether another rank has the single one, too,
    is for `check_own_gpus`, once the ranks know of each other.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1:
        return 0
    raise LocalRankError(
        f"LOCAL_RANK = {local_rank}: {socket.gethostname()} shows {visible} GPUs to PyTorch, and every process needs "
        "one of its own"
    )


def gpu_of(device: torch.device) -> Gpu | None:
    """None for a CPU."""
    if device.type == "cpu":
        return None
    return Gpu(machine(), str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-"))


def check_own_gpus(gpus: Sequence[Gpu | None]) -> None:
    """`gpus` are all ranks', by rank. Raises ConfigError where two ranks have the same one, which NCCL refuses."""
    first_with: dict[Gpu, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu is None:
            continue
        first = first_with.setdefault(gpu, rank)
        if first != rank:
            on_host = sum(other is not None and other.host == gpu.host for other in gpus)
            raise ConfigError(
                f"ranks {first} and {rank} have the same GPU of {gpu.host[0]}, GPU-{gpu.uuid}: {on_host} processes "
                "were started there, and each needs a GPU of its own, by CUDA_VISIBLE_DEVICES or by LOCAL_RANK"
            )
