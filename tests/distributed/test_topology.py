"""What `nvidia-smi topo -m` printed on real machines, shortened, with columns that not every machine has."""

import pytest

from p828.distributed.topology import Topology, cpus_of, read_topology

LEGEND = "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n\nNIC Legend:\n\n"
TWO_WITH_CARDS = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tSYS\tPHB\tSYS\t0-13,28-41\t0\t\tN/A\n"
    "GPU1\tSYS\t X \tSYS\tNODE\t14-27,42-55\t1\t\tN/A\n"
    "NIC0\tPHB\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tNODE\tSYS\t X \t\t\t\t\n"
    f"{LEGEND}  NIC0: mlx5_0\n  NIC1: mlx5_bond_0\n"
)
OLD_DRIVER = """	GPU0	GPU1	mlx5_0	CPU Affinity
GPU0	X	NV1	PIX	0-23,48-71
GPU1	NV1	X	PXB	0-23,48-71
mlx5_0	PIX	PXB	X
"""
NO_AFFINITY = """        GPU0    GPU1    CPU Affinity    NUMA Affinity
GPU0     X      PIX             N/A
GPU1    PIX      X              N/A
"""


def test_cards_processors_and_memory_nodes_are_read() -> None:
    found = read_topology(TWO_WITH_CARDS)
    assert found.links == {(0, 1): "SYS"}
    assert found.cards == {"mlx5_0": {0: "PHB", 1: "SYS"}, "mlx5_bond_0": {0: "SYS", 1: "NODE"}}
    assert found.cpus[0] == {*range(14), *range(28, 42)}
    assert found.cpus[1] == {*range(14, 28), *range(42, 56)}
    assert found.numa == {0: "0", 1: "1"}
    assert found.nearest_cards() == {0: ("mlx5_0", "PHB"), 1: ("mlx5_bond_0", "NODE")}


def test_an_old_driver_names_cards_in_the_header_and_tells_no_memory_nodes() -> None:
    found = read_topology(OLD_DRIVER)
    assert found.links == {(0, 1): "NV1"}
    assert found.cards == {"mlx5_0": {0: "PIX", 1: "PXB"}}
    assert found.cpus[1] == {*range(24), *range(48, 72)}
    assert found.numa == {}


@pytest.mark.parametrize("kind", ["PIX", "PXB", "PHB", "NODE", "SYS", "NV1", "NV18", "NEW"])
def test_every_kind_of_link_is_kept_as_it_is_named(kind: str) -> None:
    text = f"\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t{kind}\t0-3\nGPU1\t{kind}\t X \t0-3\n"
    assert read_topology(text).links == {(0, 1): kind}


def test_rows_without_affinity_have_none() -> None:
    found = read_topology(NO_AFFINITY)
    assert (found.links, found.cpus, found.numa) == ({(0, 1): "PIX"}, {}, {})


def test_what_is_no_matrix_says_nothing() -> None:
    for text in ("", "No devices were found\n", "GPU0\n", "\x1b[4m\n", TWO_WITH_CARDS[:40]):
        assert read_topology(text) == Topology()


def test_of_several_gpus_some_are_taken() -> None:
    found = read_topology(TWO_WITH_CARDS).among([1])
    assert (found.links, set(found.cpus), found.numa) == ({}, {1}, {1: "1"})
    assert found.nearest_cards() == {1: ("mlx5_bond_0", "NODE")}


def test_lists_of_processors() -> None:
    assert cpus_of("0-2,7,9-9") == {0, 1, 2, 7, 9}
    for text in ("N/A", "", "0-", "a-b", "1,,2"):
        assert cpus_of(text) == frozenset()
    assert len(cpus_of("0-99999999999")) <= 2**16 + 1
