"""What `nvidia-smi topo -m` says of a machine: its links, network cards, and which processors are near which GPU.

The matrix has a row and a column for each GPU and each network card, and columns for the processors and the memory
nearest to a GPU. Which of them there are depends on the machine and on the driver's age.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

# The name that `nvidia-smi topo -m` gives the link of two GPUs, by their indices there, the lower one first.
Links = dict[tuple[int, int], str]

KINDS = {
    "PIX": "through one PCIe switch",
    "PXB": "through several PCIe switches",
    "PHB": "through a processor's PCIe host bridge",
    "NODE": "between host bridges of a processor",
    "SYS": "between processors",
}
"""Kinds of links other than NVLink, the nearest first."""
NVLINKS = re.compile(r"NV(\d+)")  # as many NVLinks, bonded
GPU = re.compile(r"GPU(\d+)")
LEGEND = re.compile(r"(NIC\d+): (\S+)")
CPUS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
MOST_CPU = 2**16  # a number in the list that is higher is nonsense
COLORS = re.compile(r"\x1b\[[0-9;]*m")  # the header is underlined


@dataclass(frozen=True)
class Topology:
    """Empty where nvidia-smi said nothing."""

    links: Links = field(default_factory=dict)
    cards: dict[str, dict[int, str]] = field(default_factory=dict)
    """The kind of link from each network card, by the system's name for it, to each GPU."""
    cpus: dict[int, frozenset[int]] = field(default_factory=dict)
    """The processors near each GPU, for the GPUs whose row says it."""
    numa: dict[int, str] = field(default_factory=dict)
    """The memory node near each GPU, as printed: `0` or `0-1`."""

    def among(self, gpus: Collection[int]) -> "Topology":
        """What it says of these GPUs."""
        return Topology(
            {pair: kind for pair, kind in self.links.items() if pair[0] in gpus and pair[1] in gpus},
            {card: {gpu: kind for gpu, kind in kinds.items() if gpu in gpus} for card, kinds in self.cards.items()},
            {gpu: cpus for gpu, cpus in self.cpus.items() if gpu in gpus},
            {gpu: node for gpu, node in self.numa.items() if gpu in gpus},
        )

    def nearest_cards(self) -> dict[int, tuple[str, str]]:
        """Of each GPU the network card that is nearest, and the link to it."""
        found: dict[int, tuple[str, str]] = {}
        order = list(KINDS)
        for card, kinds in self.cards.items():
            for gpu, kind in kinds.items():
                if kind in order and (gpu not in found or order.index(kind) < order.index(found[gpu][1])):
                    found[gpu] = card, kind
        return found


def read_topology(text: str) -> Topology:
    """Read what `nvidia-smi topo -m` prints. Lines and cells of other forms are passed over."""
    lines = [words for line in COLORS.sub("", text).splitlines() if (words := line.split())]
    header = next((words for words in lines if words[0] == "GPU0"), [])
    # The names of devices come first; those of the last columns, as `CPU Affinity`, have spaces in them.
    devices = header[: header.index("CPU")] if "CPU" in header else header
    names = dict(LEGEND.findall(text))
    found = Topology()
    for words in lines:
        row, cells = words[0], words[1:]
        if words is header or len(cells) < len(devices):
            continue
        kinds = dict(zip(devices, cells, strict=False))
        if (own := _number(row)) is not None:
            for column, kind in kinds.items():
                if (other := _number(column)) is not None and own < other:
                    found.links[own, other] = kind
            _add_affinity(found, own, cells[len(devices) :])
        elif row in devices:
            found.cards[names.get(row, row)] = {
                gpu: kind for column, kind in kinds.items() if (gpu := _number(column)) is not None
            }
    return found


def cpus_of(text: str) -> frozenset[int]:
    """The processors of a list as `0-13,28-41`; empty for any other text."""
    if not CPUS.fullmatch(text):
        return frozenset()
    ranges = [[int(number) for number in part.split("-")] for part in text.split(",")]
    return frozenset(cpu for one in ranges for cpu in range(one[0], min(one[-1], MOST_CPU) + 1))


def _add_affinity(found: Topology, gpu: int, cells: list[str]) -> None:
    """The cells behind the links: processors and then memory nodes near the GPU, either may be missing."""
    if cells and (cpus := cpus_of(cells[0])):
        found.cpus[gpu] = cpus
        if len(cells) > 1 and CPUS.fullmatch(cells[1]):
            found.numa[gpu] = cells[1]


def _number(name: str) -> int | None:
    found = GPU.fullmatch(name)
    return int(found[1]) if found else None
