"""A measured all-reduce among this machine's GPUs, by a process for each as in training."""

import json
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from p828.distributed.group import ProcessGroup
from p828.distributed.links import MOST_BYTES, bus_bandwidth, nccl_settings, slowest_needed, time_all_reduce
from p828.distributed.topology import NVLINKS, Links
from p828.doctor.check import Check
from p828.doctor.rates import PCIE_LANE, against, card_of, pcie_of
from p828.errors import RunFailed

NAME = "all-reduce"
WITHIN = 120.0  # seconds for all of it: starting the processes takes ten, and connections that hang are found so
TO_CONNECT = timedelta(seconds=60)
TO_END = 5.0  # seconds for a process that is asked to
LEAST = 1 / 3  # of the datasheet; NCCL reaches two thirds or more over NVLink and half over PCIe (docs/doctor.md)
TYPE = torch.bfloat16


def measured_all_reduce(processes: int, backend: str = "nccl", within: float = WITHIN) -> float:
    """Seconds for a byte in an all-reduce of 256 MiB among the first `processes` GPUs, or CPU processes with gloo.

    Raises RunFailed where a process fails, where they do not get through to each other within `within` seconds, and
    where a sum is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="p828-doctor-") as directory:
        context = mp.start_processes(  # type: ignore[attr-defined]
            _measure, args=(processes, directory, backend), nprocs=processes, join=False, start_method="spawn"
        )
        assert context is not None
        try:
            _join(context, time.monotonic() + within)
        finally:
            for process in context.processes:
                process.kill()
                process.join(TO_END)
        return float(json.loads((Path(directory) / "seconds").read_text()))


def check_all_reduce(seconds_per_byte: float, gpus: int, links: Links) -> Check:
    """The measured rate against what the links should give."""
    rate = bus_bandwidth(MOST_BYTES, MOST_BYTES * seconds_per_byte, gpus) * 1e9
    kind = slowest_needed(links)
    shown = f"{rate / 1e9:,.0f} GB/s over {kind or 'unknown links'} among {gpus} GPUs, sums right"
    return against(NAME, shown, rate, link_rate(kind), LEAST, nccl_settings(kind))


def link_rate(kind: str) -> float | None:
    """Bytes a second that a link of this kind has in one direction by the datasheet; None where that is not known."""
    device = torch.device("cuda", 0)
    if NVLINKS.fullmatch(kind):
        card = card_of(device)
        return None if card is None else card.link_rate
    generation, width, _ = pcie_of(device)
    return PCIE_LANE[generation] * width if kind and width and generation in PCIE_LANE else None


def _join(context: ProcessContext, deadline: float) -> None:
    """Wait for the processes. Raises RunFailed for one that fails, and at the deadline."""
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise RunFailed("the processes do not get through to each other: a sum over them never ends")
    except ProcessException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailed(f"a process failed: {lines[-1] if lines else error}") from None


def _measure(rank: int, processes: int, directory: str, backend: str) -> None:
    """One of the processes; the first one writes the result."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = f"file://{directory}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=processes, timeout=TO_CONNECT)
    ranks = ProcessGroup(rank, processes, dist.new_group(backend="gloo"))
    _check_sum(rank, processes, device)
    numbers = (MOST_BYTES if backend == "nccl" else 2**20) // TYPE.itemsize
    seconds = time_all_reduce(numbers, TYPE, device, ranks)
    if rank == 0:
        (Path(directory) / "seconds").write_text(json.dumps(seconds / (numbers * TYPE.itemsize)))
    dist.destroy_process_group()


def _check_sum(rank: int, processes: int, device: torch.device) -> None:
    """Some machines' direct transfers between GPUs give wrong numbers in silence. Raises RuntimeError."""
    numbers = torch.full((2**20,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    if not (numbers == processes * (processes + 1) / 2).all().item():
        raise RuntimeError("the sum over the GPUs is wrong: NCCL_P2P_DISABLE=1 takes another way")
