"""Samples are what `nvidia-smi topo -m` printed on real machines, shortened to the GPUs and some of the rest."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from p828.bench.collectives import counted
from p828.distributed.group import ProcessGroup
from p828.distributed.links import (
    FIRST_BYTES,
    REPEATS,
    advice,
    bus_bandwidth,
    check_topology,
    links_between,
    read_links,
    slowest_needed,
    time_all_reduce,
)

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""
TWO_H100 = (
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \t0-31\t0\t\tN/A\n"
) + LEGEND
TWO_WITH_NETWORK = (
    "\tGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tSYS\tPHB\tSYS\t0-13,28-41\t0\t\tN/A\n"
    "GPU1\tSYS\t X \tSYS\tPHB\t14-27,42-55\t1\t\tN/A\n"
    "NIC0\tPHB\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tPHB\tSYS\t X \t\t\t\t\n"
) + LEGEND
FOUR_T4 = """        GPU0    GPU1    GPU2    GPU3    CPU Affinity
GPU0     X      SYS     SYS     SYS     0-15,32-47
GPU1    SYS      X      NODE    NODE    16-31,48-63
GPU2    SYS     NODE     X      NODE    16-31,48-63
GPU3    SYS     NODE    NODE     X      16-31,48-63
"""
EIGHT_V100 = """	GPU0	GPU1	GPU2	GPU3	GPU4	GPU5	GPU6	GPU7	mlx5_0	CPU Affinity
GPU0	X	NV1	NV2	NV1	SYS	SYS	SYS	NV2	NODE	0-23,48-71
GPU1	NV1	X	NV1	NV2	SYS	SYS	NV2	SYS	NODE	0-23,48-71
GPU2	NV2	NV1	X	NV2	SYS	NV1	SYS	SYS	PIX	0-23,48-71
GPU3	NV1	NV2	NV2	X	NV1	SYS	SYS	SYS	PIX	0-23,48-71
GPU4	SYS	SYS	SYS	NV1	X	NV2	NV2	NV1	SYS	24-47,72-95
GPU5	SYS	SYS	NV1	SYS	NV2	X	NV1	NV2	SYS	24-47,72-95
GPU6	SYS	NV2	SYS	SYS	NV2	NV1	X	NV1	SYS	24-47,72-95
GPU7	NV2	SYS	SYS	SYS	NV1	NV2	NV1	X	SYS	24-47,72-95
mlx5_0	NODE	NODE	PIX	PIX	SYS	SYS	SYS	SYS	X
"""
SYS = {(0, 1): "SYS"}
PIX = {(0, 1): "PIX"}
GIB = 2**30


def seconds_at(bandwidth: float, num_bytes: int = GIB) -> float:
    """For a sum over two ranks, each of which sends and receives every byte once; in GB/s."""
    return num_bytes / (bandwidth * 1e9)


@pytest.mark.parametrize(
    "text,links",
    [
        (TWO_H100, {(0, 1): "NV18"}),
        (TWO_WITH_NETWORK, SYS),
        (FOUR_T4, {(0, 1): "SYS", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "NODE", (1, 3): "NODE", (2, 3): "NODE"}),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \t0-19\n" + LEGEND, {}),
        ("", {}),
        ("No devices were found\n", {}),
    ],
    ids=["two H100", "with network", "four T4", "one GPU", "nothing", "no device"],
)
def test_the_links_between_gpus_are_read(text: str, links: dict[tuple[int, int], str]) -> None:
    assert read_links(text) == links


def test_a_matrix_of_many_gpus_is_read_whole() -> None:
    links = read_links(EIGHT_V100)
    assert set(links) == set(itertools.combinations(range(8), 2))
    assert [links[pair] for pair in ((0, 7), (2, 5), (1, 4), (4, 5))] == ["NV2", "NV1", "SYS", "NV2"]


def test_a_slow_pair_counts_only_if_no_faster_way_joins_all_gpus() -> None:
    assert slowest_needed(read_links(EIGHT_V100)) == "NV2"  # 0-2-3-1-6-4-5-7
    assert slowest_needed(read_links(FOUR_T4)) == "SYS"
    assert slowest_needed(
        {(0, 1): "NV4", (2, 3): "NV4", **dict.fromkeys([(0, 2), (0, 3), (1, 2), (1, 3)], "NODE")}
    ) == ("NODE")
    assert slowest_needed({(0, 1): "NODE", (0, 2): "SYS", (1, 2): "NODE"}) == "NODE"
    assert slowest_needed({}) == ""


def stand_in(directory: Path, matrix: str, gpus: list[str]) -> str:
    """A directory with an nvidia-smi that knows these GPUs, for PATH."""
    rows = "".join(f"{number}, {uuid}\n" for number, uuid in enumerate(gpus))
    program = directory / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nprint({matrix!r} if sys.argv[1:] == ['topo', '-m'] else {rows!r}, end='')\n"
    )
    program.chmod(0o755)
    return str(directory)


def test_only_the_links_between_the_ranks_gpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stand_in(tmp_path, FOUR_T4, ["GPU-aa", "GPU-bb", "GPU-cc", "GPU-dd"]))
    assert links_between(["dd", "bb", "cc"]) == {(1, 2): "NODE", (1, 3): "NODE", (2, 3): "NODE"}
    assert links_between(["GPU-aa", "GPU-dd"]) == {(0, 3): "SYS"}
    assert links_between(["aa", "MIG-ee"]) == {}


def test_a_machine_without_a_working_nvidia_smi_has_no_known_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert links_between(["aa", "bb"]) == {}
    program = Path(stand_in(tmp_path, TWO_H100, ["GPU-aa", "GPU-bb"])) / "nvidia-smi"
    assert links_between(["aa", "bb"]) == {(0, 1): "NV18"}
    program.write_text(program.read_text() + "sys.exit(9)\n")
    assert links_between(["aa", "bb"]) == {}


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    # of all_reduce_perf's output for 4 ranks: 4218900 bytes in 1011.4 us are 4.17 GB/s, and 6.26 GB/s of the bus
    assert bus_bandwidth(4218900, 1011.4e-6, 4) == pytest.approx(6.26, abs=0.005)
    assert bus_bandwidth(10**9, 1.0, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "links,bandwidth,is_told",
    [
        ({(0, 1): "NV18"}, 330.0, False),
        ({(0, 1): "NV18"}, 20.0, True),  # through PCIe
        ({(0, 1): "NV4"}, 40.0, False),
        (PIX, 5.0, False),
        (PIX, 0.5, True),
        ({(0, 1): "NODE"}, 20.0, True),
        (SYS, 20.0, True),
        ({}, 12.0, False),
        ({}, 0.1, True),
    ],
)
def test_slow_links_and_slow_measurements_are_reported(
    links: dict[tuple[int, int], str], bandwidth: float, is_told: bool
) -> None:
    assert bool(advice(links, seconds_at(bandwidth), GIB, 2)) is is_told


def test_a_small_gradient_says_nothing_of_the_bandwidth() -> None:
    assert advice(PIX, 100e-6, 10_000, 2, reductions=64) == []
    assert advice(PIX, 100.0, 10_000, 2)


def test_the_pairs_and_the_cost_per_step_are_reported() -> None:
    lines = advice(read_links(FOUR_T4), 2.5, GIB, 4)
    assert "GPU0-GPU1, GPU0-GPU2, GPU0-GPU3 are connected by SYS" in lines[0]
    assert "1.07 GB) over 4 ranks takes 2.5 s (0.644 GB/s" in lines[1]
    assert ": up to 2.5 s of every step" in lines[1]
    assert len(lines) <= 4
    more = dict.fromkeys(itertools.combinations(range(4), 2), "SYS")
    assert "GPU0-GPU3 and 3 more pairs are" in advice(more, 2.5, GIB, 4)[0]
    assert "GPU0-GPU1 is connected" in advice(SYS, 2.5, GIB, 2)[0]


def test_what_to_set_depends_on_how_often_and_over_what_is_summed() -> None:
    once, often = advice(SYS, 2.0, GIB, 2)[2], advice(SYS, 2.0, GIB, 2, reductions=16)
    assert "--train.gradient-accumulation" in once
    assert "NCCL_P2P_LEVEL=SYS" in once
    assert "2 s, 16 times a step" in often[1]
    assert ": up to 32 s of every step" in often[1]
    assert "--train.gradient-accumulation" not in often[2]
    assert "--deepspeed.stage 1" in often[2]
    assert "NCCL_SOCKET_IFNAME" in advice({}, 2.0, GIB, 2)[2]
    assert "NVLink" in advice({(0, 1): "NV18"}, 2.0, GIB, 2)[2]
    assert "--sharded.shard-within host" in advice({}, 2.0, GIB, 4, reductions=16, num_hosts=2)[2]


def test_one_gpu_is_offered_where_it_is_faster() -> None:
    # Four ranks compute for 1 s and sum for 3 s; one GPU needs 4 s for as many tokens.
    assert advice(SYS, 3.0, GIB, 4)[-1].endswith("in less than 1 s")


def test_one_rank_has_nothing_to_check() -> None:
    assert check_topology(ProcessGroup(), torch.device("cuda"), 10**6, torch.float32) is None


def time_on_a_rank(rank: int, store: str) -> None:
    """What two processes find; the assertions are seen by who spawned them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        ranks, cpu = ProcessGroup(rank, 2), torch.device("cpu")
        # number of numbers, seconds for it, and bytes that are summed for one measurement
        first = (1 + REPEATS) * FIRST_BYTES
        for numbers, most_seconds, expected in (
            (1000, 60.0, (1 + REPEATS) * 4000),
            (10**6, 60.0, first + (1 + REPEATS) * 4 * 10**6),
            (10**12, 0.0, first),
        ):
            with counted() as found:
                seconds = time_all_reduce(numbers, torch.float32, cpu, ranks, most_seconds)
            assert found["all_reduce"] == expected + 4, (numbers, found)  # one number to connect
            assert ranks.all_gather_object(seconds) == [seconds, seconds]
            assert math.isfinite(seconds)
            assert seconds > 0
        assert seconds > 1, "four terabytes in the time of a mebibyte"
        links = check_topology(ranks, cpu, 1000, torch.float32)
        assert links is not None
        assert ranks.all_gather_object(links) == [links, links]
        assert links.seconds > 0
        assert links.lines == []
    finally:
        dist.destroy_process_group()


def test_two_processes_time_the_same_sums_up_to_the_limit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(time_on_a_rank, (str(tmp_path / "store"),), nprocs=2)


def check_on_a_gpu(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        ranks, device = ProcessGroup(rank, 2, dist.new_group(backend="gloo")), torch.device("cuda", rank)
        uuids = ranks.all_gather_object(str(torch.cuda.get_device_properties(device).uuid))
        links = links_between(uuids)
        assert len(links) == 1, (uuids, links)
        measured = check_topology(ranks, device, 10**8, torch.bfloat16)
        assert measured is not None
        assert ranks.all_gather_object(measured) == [measured, measured]
        if next(iter(links.values())).startswith("NV"):
            assert measured.lines == []
    finally:
        dist.destroy_process_group()


def test_two_gpus_are_found_by_nvidia_smi_and_timed(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    torch.multiprocessing.spawn(check_on_a_gpu, (str(tmp_path / "store"),), nprocs=2)
