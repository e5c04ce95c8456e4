"""Whether the links between the GPUs are fast enough to train on several, told before hours are spent.

Every step sums the gradient over all ranks. Over a slow link that can take longer than the computing it spreads, and
one GPU would be done sooner. So the links are read, such a sum is timed, and what it will cost is said.
"""

import re
import subprocess
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from p828.distributed.group import ProcessGroup
from p828.system.device import machine

# What `nvidia-smi topo -m` calls the link of two GPUs, by their numbers there, the lower one first.
Links = dict[tuple[int, int], str]

# GB/s, by kind of link. NCCL plans with these (src/graph/topo.h), and of what it has for several generations the
# lowest is taken: 12 for one NVLink of an RTX 3090 and for PCIe 3.0 x16, 6 between processors.
NVLINK = 12.0
PCIE = 12.0
FAR = 6.0
EXPECTED = {"PIX": PCIE, "PXB": PCIE, "PHB": PCIE, "NODE": FAR, "SYS": FAR}
SLOW = {"NODE": "between host bridges of a processor", "SYS": "between processors"}
FAR_UNDER = 1 / 3  # of what is expected; PCIe through main memory, or with half of its lanes, is still above
LATENCY = 1e-3  # seconds; a sum that takes no longer says nothing of the bandwidth
NAMED = 3  # pairs of GPUs in a message

FIRST_BYTES = 2**20
MOST_BYTES = 2**28  # by then a link carries what it can, and the time grows with the size
GROWTH = 8
REPEATS = 3
MOST_SECONDS = 10.0
ANSWER_WITHIN = 30.0  # seconds for nvidia-smi


def check_topology(
    ranks: ProcessGroup, device: torch.device, gradient_numbers: int, dtype: torch.dtype, reductions: int = 1
) -> list[str]:
    """What to tell the user of the links between the ranks' GPUs, the same on all ranks; to be called by all.

    `gradient_numbers` of `dtype` are summed `reductions` times a step. Empty when there is nothing to tell, on one GPU
    or on CPUs. Takes up to about 10 s and, for that time, 330 MiB of the device.
    """
    if ranks.size == 1 or device.type != "cuda":
        return []
    own = (machine(), str(torch.cuda.get_device_properties(device).uuid))
    hosts, uuids = zip(*ranks.all_gather_object(own), strict=True)
    is_one_host = len(set(hosts)) == 1  # of what is between hosts, only the measurement knows
    links = ranks.on_rank_0(lambda: links_between(uuids) if is_one_host else {})
    seconds = time_all_reduce(gradient_numbers, dtype, device, ranks)
    return advice(links, seconds, gradient_numbers * dtype.itemsize, ranks.size, reductions=reductions)


def links_between(uuids: Sequence[str]) -> Links:
    """The links between these GPUs of this machine; empty where nvidia-smi is missing, fails or does not know them."""
    # PyTorch's numbers depend on CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, so the GPUs are found by what they are.
    rows = (line.split(", ") for line in _nvidia_smi("--query-gpu=index,uuid", "--format=csv,noheader").splitlines())
    numbers = {row[1].strip().removeprefix("GPU-"): int(row[0]) for row in rows if row[0].isdigit()}
    wanted = {numbers.get(uuid.removeprefix("GPU-")) for uuid in uuids}
    if None in wanted:
        return {}
    return {pair: kind for pair, kind in read_links(_nvidia_smi("topo", "-m")).items() if wanted.issuperset(pair)}


def read_links(text: str) -> Links:
    """The links between GPUs in what `nvidia-smi topo -m` prints; empty if there are none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the header is underlined
    lines = (words for line in plain.splitlines() if (words := line.split()))
    header = next((words for words in lines if words[0] == "GPU0"), [])
    links = {}
    for row, *cells in lines:
        for column, kind in zip(header, cells, strict=False):  # the GPUs' columns come first
            first, second = _number(row), _number(column)
            if first is not None and second is not None and first < second:
                links[first, second] = kind
    return links


def time_all_reduce(
    numbers: int, dtype: torch.dtype, device: torch.device, ranks: ProcessGroup, most_seconds: float = MOST_SECONDS
) -> float:
    """Seconds in which the default process group sums `numbers` numbers over ranks, the same on all of them.

    Begins with 1 MiB and goes on to larger tensors, up to 256 MiB, while the next is done within `most_seconds`; to
    `numbers` it is extrapolated.
    """
    _all_reduce(torch.zeros(1, dtype=dtype, device=device))  # makes the connections, which training needs as well
    begun = time.monotonic()
    limit = min(numbers, MOST_BYTES // dtype.itemsize)
    size = min(limit, FIRST_BYTES // dtype.itemsize)
    while True:
        tensor = torch.zeros(size, dtype=dtype, device=device)
        _all_reduce(tensor)  # sets up what NCCL uses for this size
        fastest = min(_all_reduce(tensor) for _ in range(REPEATS))
        # The ranks must go on to the same size, so that they decide by the same times: those of the slowest.
        seconds, spent = map(max, zip(*ranks.all_gather([fastest, time.monotonic() - begun]), strict=True))
        larger = min(limit, GROWTH * size)
        if larger == size or spent + (1 + REPEATS) * seconds * larger / size > most_seconds:
            return seconds * numbers / size
        size = larger


def bus_bandwidth(num_bytes: int, seconds: float, world_size: int) -> float:
    """GB/s over the slowest link, from the time of an all-reduce.

    2 (n - 1) / n of the bytes must cross it: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return num_bytes / seconds * 2 * (world_size - 1) / world_size / 1e9


def advice(links: Links, seconds: float, gradient_bytes: int, world_size: int, reductions: int = 1) -> list[str]:
    """Lines for the user about a slow link, its cost and what to set; empty if all is well.

    One sum of the gradient over ranks takes `seconds`, and a step has `reductions` of them. Without links the
    measurement is judged alone.
    """
    kind, cost = slowest_needed(links), reductions * seconds
    bandwidth, expected = bus_bandwidth(gradient_bytes, seconds, world_size), expected_bandwidth(kind)
    is_far_under = bandwidth < FAR_UNDER * expected and seconds > LATENCY
    if kind not in SLOW and not is_far_under:
        return []
    if kind in SLOW:
        lines = [f"slow link: {_named(links, kind)} by {kind} ({SLOW[kind]})"]
    else:
        lines = [f"slow link: far less than is usual {f'over {kind}' if kind else 'between GPUs or hosts'}"]
    times = f", {reductions} times a step" if reductions > 1 else ""
    lines.append(
        f"summing the gradient ({gradient_bytes / 1e9:.3g} GB) over {world_size} ranks takes {seconds:.3g} s{times} "
        f"({bandwidth:.3g} GB/s; at least {expected:.3g} is usual): up to {cost:.3g} s of every step, "
        "less what overlaps with the backward pass"
    )
    lines.append(f"try {_fewer_sums(reductions)}; {_variables(kind)}")
    # In one step and its sums, n ranks do what takes one GPU n steps.
    limit = cost / (world_size - 1)
    lines.append(
        f"without overlap, one GPU (--engine plain) is faster if it computes a step in less than {limit:.3g} s"
    )
    return lines


def slowest_needed(links: Links) -> str:
    """The slowest kind of link that joining all GPUs takes; empty without links.

    Not every pair counts: eight V100s are joined by NVLink although some pairs are not, and NCCL goes round those.
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
    """GB/s of an all-reduce over such a link at least; of one that is not known, as between processors."""
    if bonded := re.fullmatch(r"NV(\d+)", kind):
        return NVLINK * int(bonded[1])
    return EXPECTED.get(kind, FAR)


def _named(links: Links, kind: str) -> str:
    """The pairs of GPUs with such a link, or the first of them, and the verb."""
    pairs = [f"GPU{first}-GPU{second}" for (first, second), found in sorted(links.items()) if found == kind]
    more = f" and {len(pairs) - NAMED} more pairs" if len(pairs) > NAMED else ""
    return ", ".join(pairs[:NAMED]) + more + (" is connected" if len(pairs) == 1 else " are connected")


def _fewer_sums(reductions: int) -> str:
    """What of ours to set. From ZeRO stage 2 on every micro-batch is summed over ranks, so more of them do not help."""
    if reductions == 1:
        return "a higher --train.gradient-accumulation (one sum for more tokens)"
    return (
        f"--deepspeed.stage 1 (one sum a step instead of {reductions}) if it fits, a lower "
        "--deepspeed.reduce-bucket-size (sums begin earlier in the backward pass)"
    )


def _variables(kind: str) -> str:
    """What of NCCL's to set."""
    if not kind:
        return "NCCL_SOCKET_IFNAME=<the fastest interface between hosts>; NCCL_DEBUG=INFO tells what NCCL uses"
    if kind.startswith("NV"):
        return "unset NCCL_P2P_DISABLE and NCCL_P2P_LEVEL; NCCL_DEBUG=INFO tells whether NCCL uses NVLink"
    return "NCCL_P2P_LEVEL=SYS (directly from GPU to GPU) or NCCL_P2P_DISABLE=1 (through main memory)"


def _all_reduce(tensor: torch.Tensor) -> float:
    """Seconds for it, from when the device has nothing else to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start


def _number(name: str) -> int | None:
    found = re.fullmatch(r"GPU(\d+)", name)
    return int(found[1]) if found else None


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ANSWER_WITHIN, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
