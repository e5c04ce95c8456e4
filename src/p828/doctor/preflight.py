"""The checks of this machine, and of a configuration on it, in the order of what rests on what.

Those of `versions` come before: without the packages this file cannot be imported.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from p828.config import Config
from p828.distributed.links import topology_of
from p828.distributed.topology import Topology
from p828.doctor.all_reduce import NAME as ALL_REDUCE
from p828.doctor.all_reduce import check_all_reduce, measured_all_reduce
from p828.doctor.check import Check
from p828.doctor.data import check_data
from p828.doctor.gpu import check_gpus
from p828.doctor.kernels.self_tests import check_all_kernels, check_kernels
from p828.doctor.links import check_links
from p828.doctor.model import check_model
from p828.doctor.network import check_network
from p828.doctor.rates import check_rates
from p828.doctor.room import check_room
from p828.doctor.run_directory import check_run_directory
from p828.doctor.tokenizer import check_tokenizer
from p828.doctor.trackers import check_trackers
from p828.errors import P828Error, RunFailed
from p828.train.log.console import waiting

Report = Callable[[str], None]
LONGEST_CAUSE = 300  # characters of what PyTorch says


def preflight(config: Config | None, report: Report) -> Iterator[Check]:
    """Each check as it is made. Without a configuration, the machine alone. Nothing is left behind.

    `report` is called with a line for whatever takes longer than two seconds.
    """
    is_on_cpu = config is not None and config.train.device == "cpu"
    gpus = 0 if is_on_cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    directory = Path("runs") if config is None else config.run_dir
    if not is_on_cpu:
        yield from _made("looking at the GPUs", report, lambda: check_gpus(config))
    yield from _made("looking at memory and disk", report, lambda: check_room(config, directory, gpus))
    yield from _made(f"trying out {directory}", report, lambda: check_run_directory(config, directory, gpus))
    for each in [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]:
        yield from _made(f"measuring the rates of {each}", report, partial(check_rates, each))
    if gpus:
        yield from _links(config, gpus, report)
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    yield from _kernels(device, report)
    for number in range(1, gpus):
        further = torch.device("cuda", number)
        yield from _made(f"trying out the kernels on GPU {number}", report, partial(check_all_kernels, further))
    yield from _made("asking the hub and Weights & Biases", report, lambda: check_network(config))
    yield from _made("looking at the trackers", report, lambda: check_trackers(config))
    if config is not None:
        yield check_model(config, device)
        yield from _text(config, report)


def _made(doing: str, report: Report, check: Callable[[], Iterable[Check]]) -> Iterable[Check]:
    """What `check` finds. What keeps it from looking is a warning, and what PyTorch or the driver raises a failure."""
    with waiting(doing, report):
        try:
            return list(check())
        except P828Error as error:
            first, _, rest = str(error).partition("\n")
            return [Check(doing, "warning", f"not done: {first}", rest)]
        except RuntimeError as error:  # as of a device that has failed, or a driver that does not fit
            text = " ".join(str(error).split())[:LONGEST_CAUSE]
            return [Check(doing, "failure", text, "nvidia-smi and dmesg may say more; start the machine again")]


def _links(config: Config | None, gpus: int, report: Report) -> Iterator[Check]:
    """The links as nvidia-smi names them, beside what an all-reduce over them measures."""
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(gpus)]
    with waiting("reading nvidia-smi topo -m", report):
        topology, seconds = topology_of(uuids), None
    if gpus > 1:
        with waiting(f"measuring an all-reduce among {gpus} GPUs", report):
            seconds, found = _all_reduce(config, gpus, topology)
        yield found
    yield from check_links(topology, gpus, seconds, config)


def _all_reduce(config: Config | None, gpus: int, topology: Topology) -> tuple[float | None, Check]:
    """Seconds for a byte, None where it fails, and what that means."""
    try:
        seconds = measured_all_reduce(gpus)
    except RunFailed as error:
        uses_one = config is not None and config.engine == "plain"
        return None, Check(
            ALL_REDUCE, "warning" if uses_one else "failure", str(error),
            "NCCL_DEBUG=INFO tells what NCCL tries; NCCL_P2P_DISABLE=1 has it go through main memory; "
            "NCCL_SOCKET_IFNAME=lo if it takes the wrong network; or train on one GPU (--engine plain)",
        )  # fmt: skip
    return seconds, check_all_reduce(seconds, gpus, topology.links)


def _kernels(device: torch.device, report: Report) -> Iterator[Check]:
    tests = check_kernels(device)
    while True:
        with waiting("compiling and trying out the next kernel", report):
            found = next(tests, None)
        if found is None:
            return
        yield found


def _text(config: Config, report: Report) -> Iterator[Check]:
    """The tokenizer, and with it the data."""
    with waiting("making the tokenizer", report):
        tokenizer, found = check_tokenizer(config)
    yield found
    yield from _made("reading a sample of the data", report, lambda: check_data(config, tokenizer))
