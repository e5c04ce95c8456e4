"""Whether the links between the GPUs are fast enough to train on several, measured before hours are spent.

Every step all-reduces the gradient. Over a slow link that can take longer than the computing that is spread, and one
GPU would be faster. So p828 reads the kinds of links, times an all-reduce, and warns of what it costs a step.
"""

import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from p828.distributed.group import ProcessGroup
from p828.distributed.topology import KINDS, NVLINKS, Links, Topology, read_topology
from p828.system.device import machine

# GB/s, by kind of link: the numbers with which NCCL plans (src/graph/topo.h), of several generations the lowest. One
# NVLink of an RTX 3090 and PCIe 3.0 x16 have 12, the link between processors 6.
NVLINK = 12.0
PCIE = 12.0
FAR = 6.0
EXPECTED = {"PIX": PCIE, "PXB": PCIE, "PHB": PCIE, "NODE": FAR, "SYS": FAR}
SLOW = {kind: KINDS[kind] for kind in ("NODE", "SYS")}
FAR_UNDER = 1 / 3  # of the expected bandwidth; PCIe through main memory, or with half of its lanes, is above it
LATENCY = 1e-3  # seconds; the time of a shorter all-reduce says nothing of the bandwidth
NAMED = 3  # pairs of GPUs in a message

FIRST_BYTES = 2**20
MOST_BYTES = 2**28  # at this size a link is at its full bandwidth, and the time grows with the size
GROWTH = 8
REPEATS = 3
MOST_SECONDS = 10.0
ANSWER_WITHIN = 30.0  # seconds for nvidia-smi


class MeasuredLinks(NamedTuple):
    """What the links between the ranks cost, as it was measured."""

    seconds: float
    """Of an all-reduce of the whole gradient."""
    kind: str
    """The slowest link that is needed to join all GPUs, as `nvidia-smi topo -m` has it; empty if it is not known."""
    lines: list[str]
    """For the user, about links between GPUs that are slower than usual."""


def check_topology(
    ranks: ProcessGroup, device: torch.device, gradient_numbers: int, dtype: torch.dtype, reductions: int = 1
) -> MeasuredLinks | None:
    """Measure the links between the ranks, the same on all of them; all ranks must call it. None on a single rank.

    `gradient_numbers` numbers of `dtype` are all-reduced `reductions` times a step. There are no lines where the links
    are as fast as usual, and on CPUs, where nobody knows what is usual. Takes up to about 10 s and meanwhile 330 MiB of
    the device.
    """
    if ranks.size == 1:
        return None
    if device.type != "cuda":
        return MeasuredLinks(time_all_reduce(gradient_numbers, dtype, device, ranks), "", [])
    own = (machine(), str(torch.cuda.get_device_properties(device).uuid))
    hosts, uuids = zip(*ranks.all_gather_object(own), strict=True)
    num_hosts = len(set(hosts))  # nvidia-smi does not know the links between hosts
    links = ranks.on_rank_0(lambda: links_between(uuids) if num_hosts == 1 else {})
    seconds = time_all_reduce(gradient_numbers, dtype, device, ranks)
    lines = advice(links, seconds, gradient_numbers * dtype.itemsize, ranks.size, reductions, num_hosts)
    return MeasuredLinks(seconds, slowest_needed(links), lines)


def links_between(uuids: Sequence[str]) -> Links:
    """The links between these GPUs of this machine; empty where nvidia-smi is missing, fails or does not know them."""
    return topology_of(uuids).links


def topology_of(uuids: Sequence[str]) -> Topology:
    """The links of these GPUs, by their indices in nvidia-smi; empty where it is missing, fails or does not know them.

    The GPUs are found by their UUIDs, as PyTorch's indices depend on CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.
    """
    rows = (line.split(", ") for line in nvidia_smi("--query-gpu=index,uuid", "--format=csv,noheader").splitlines())
    numbers = {row[1].strip().removeprefix("GPU-"): int(row[0]) for row in rows if row[0].isdigit()}
    wanted = {numbers.get(uuid.removeprefix("GPU-")) for uuid in uuids}
    if None in wanted:
        return Topology()
    return read_topology(nvidia_smi("topo", "-m")).among({number for number in wanted if number is not None})


def read_links(text: str) -> Links:
    """The links between GPUs in what `nvidia-smi topo -m` prints; empty if there are none."""
    return read_topology(text).links


def time_all_reduce(
    numbers: int, dtype: torch.dtype, device: torch.device, ranks: ProcessGroup, most_seconds: float = MOST_SECONDS
) -> float:
    """Seconds of an all-reduce of `numbers` numbers in PyTorch's default process group, the same on all ranks.

    Measures tensors of 1 MiB and then larger ones, up to 256 MiB, as long as the next one fits into `most_seconds`.
    The time for `numbers` is extrapolated from the largest.
    """
    _all_reduce(torch.zeros(1, dtype=dtype, device=device))  # makes the connections, which training needs too
    begun = time.monotonic()
    limit = min(numbers, MOST_BYTES // dtype.itemsize)
    size = min(limit, FIRST_BYTES // dtype.itemsize)
    while True:
        tensor = torch.zeros(size, dtype=dtype, device=device)
        _all_reduce(tensor)  # NCCL sets up its buffers for this size
        fastest = min(_all_reduce(tensor) for _ in range(REPEATS))
        # All ranks must go on to the same size, so all of them decide by the slowest rank's times.
        seconds, spent = map(max, zip(*ranks.all_gather([fastest, time.monotonic() - begun]), strict=True))
        larger = min(limit, GROWTH * size)
        if larger == size or spent + (1 + REPEATS) * seconds * larger / size > most_seconds:
            return seconds * numbers / size
        size = larger


def bus_bandwidth(num_bytes: int, seconds: float, world_size: int) -> float:
    """GB/s over the slowest link, from the time of an all-reduce.

    2 (n - 1) / n of the bytes cross that link: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return num_bytes / seconds * 2 * (world_size - 1) / world_size / 1e9


def advice(
    links: Links, seconds: float, gradient_bytes: int, world_size: int, reductions: int = 1, num_hosts: int = 1
) -> list[str]:
    """Lines for the user about a slow link, its cost and what to set; empty if no link is slow.

    One all-reduce of the gradient takes `seconds`, and a step has `reductions` of them. Without `links`, the measured
    bandwidth alone decides.
    """
    kind, cost = slowest_needed(links), reductions * seconds
    bandwidth, expected = bus_bandwidth(gradient_bytes, seconds, world_size), expected_bandwidth(kind)
    is_far_under = bandwidth < FAR_UNDER * expected and seconds > LATENCY
    if kind not in SLOW and not is_far_under:
        return []
    if kind in SLOW:
        lines = [f"slow link: {named_pairs(links, kind)} by {kind} ({SLOW[kind]})"]
    else:
        lines = [f"slow link: far less than is usual {f'over {kind}' if kind else 'between GPUs or hosts'}"]
    times = f", {reductions} times a step" if reductions > 1 else ""
    lines.append(
        f"summing the gradient ({gradient_bytes / 1e9:.3g} GB) over {world_size} ranks takes {seconds:.3g} s{times} "
        f"({bandwidth:.3g} GB/s; at least {expected:.3g} is usual): up to {cost:.3g} s of every step, "
        "less what overlaps with the backward pass"
    )
    lines.append(f"try {_fewer_reductions(reductions, num_hosts)}; {nccl_settings(kind)}")
    # In one step and its all-reduces, n ranks do the work of n steps of one GPU.
    limit = cost / (world_size - 1)
    lines.append(
        f"without overlap, one GPU (--engine plain) is faster if it computes a step in less than {limit:.3g} s"
    )
    return lines


def slowest_needed(links: Links) -> str:
    """The slowest kind of link in the fastest tree that joins all GPUs; empty without links.

    Not every pair counts: NVLink joins eight V100s although some pairs have none, and NCCL goes round those pairs.
    """
    joined_to = {gpu: {gpu} for pair in links for gpu in pair}
    slowest = ""
    for (first, second), kind in sorted(links.items(), key=lambda item: (-expected_bandwidth(item[1]), item[1])):
        if second not in joined_to[first]:
            together = joined_to[first] | joined_to[second]
            joined_to |= dict.fromkeys(together, together)
            slowest = kind
    return slowest


def expected_bandwidth(kind: str) -> float:
    """GB/s that an all-reduce over such a link reaches at least; a kind that is not known counts as `FAR`."""
    if bonded := NVLINKS.fullmatch(kind):
        return NVLINK * int(bonded[1])
    return EXPECTED.get(kind, FAR)


def named_pairs(links: Links, kind: str) -> str:
    """The pairs of GPUs with this kind of link, at most `NAMED` of them, and the verb."""
    pairs = [f"GPU{first}-GPU{second}" for (first, second), found in sorted(links.items()) if found == kind]
    more = f" and {len(pairs) - NAMED} more pairs" if len(pairs) > NAMED else ""
    return ", ".join(pairs[:NAMED]) + more + (" is connected" if len(pairs) == 1 else " are connected")


def _fewer_reductions(reductions: int, num_hosts: int) -> str:
    """The setting that makes fewer all-reduces: from ZeRO stage 2 on each micro-batch has one, so more do not help."""
    if reductions == 1:
        return "a higher --train.gradient-accumulation (one sum for more tokens)"
    if num_hosts > 1:
        return "--engine sharded --sharded.shard-within host (one sum a step between hosts) if it fits"
    return (
        f"--sharded.stage 1 or --deepspeed.stage 1 (one sum a step instead of {reductions}) if it fits, through "
        "DeepSpeed a lower --deepspeed.reduce-bucket-size (sums begin earlier in the backward pass)"
    )


def nccl_settings(kind: str) -> str:
    """The environment variables of NCCL to set."""
    if not kind:
        return "NCCL_SOCKET_IFNAME=<the fastest interface between hosts>; NCCL_DEBUG=INFO tells what NCCL uses"
    if kind.startswith("NV"):
        return "unset NCCL_P2P_DISABLE and NCCL_P2P_LEVEL; NCCL_DEBUG=INFO tells whether NCCL uses NVLink"
    return "NCCL_P2P_LEVEL=SYS (directly from GPU to GPU) or NCCL_P2P_DISABLE=1 (through main memory)"


def _all_reduce(tensor: torch.Tensor) -> float:
    """Seconds of one all-reduce; the device has finished all other work before."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start


def nvidia_smi(*arguments: str) -> str:
    """The output of nvidia-smi; empty where it is missing or fails."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ANSWER_WITHIN, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
