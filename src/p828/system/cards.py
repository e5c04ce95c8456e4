"""GPUs by their vendors' datasheets, without PyTorch: what a card can do at most, whether or not one is here."""

import re
from typing import NamedTuple

from p828.errors import ConfigError, did_you_mean

GIB = 2**30
PCIE_5 = 64e9  # bytes a second one way, of 16 lanes


class Card(NamedTuple):
    """One GPU. Rates are peaks that no program reaches."""

    name: str
    """What a user calls it."""
    device_name: str
    """Part of what the driver calls it."""
    peak_flops: float
    """Dense bfloat16 FLOP/s, summed in float32."""
    memory_bytes: int
    """What the driver shows to programs, a little less than on the box."""
    memory_rate: float
    """Bytes a second to and from its memory."""
    link_rate: float
    """Bytes a second to another GPU of its host, one way: NVLink where the card has it, else PCIe."""
    watts: int
    """Power limit of the board; of GH200 that of the module, its CPU included."""

    @property
    def has_nvlink(self) -> bool:
        """Told by the rate, which no PCIe of these cards has."""
        return self.link_rate > PCIE_5


# From NVIDIA's datasheets of A100, H100, H200, HGX B200, GH200 and L40S, and for the RTX cards from the tables of the
# whitepapers "Ampere GA102", "Ada" and "RTX Blackwell" (BF16 with FP32 accumulate). Rates that these give with sparsity
# are halved, as are links' rates of both directions. H100's three are also in torchtitan's `get_peak_flops`. NVLink
# bridges between pairs of RTX 3090 or PCIe cards are not counted.
CARDS = (
    Card("gh200", "GH200", 989e12, int(94.5 * GIB), 4.0e12, 450e9, 1000),
    Card("b200", "B200", 2250e12, int(178.3 * GIB), 8.0e12, 900e9, 1000),
    Card("h200", "H200", 989e12, int(139.8 * GIB), 4.8e12, 450e9, 700),
    Card("h100-pcie", "H100 PCIe", 756e12, int(79.1 * GIB), 2.0e12, 64e9, 350),
    Card("h100-nvl", "H100 NVL", 835e12, int(93.0 * GIB), 3.9e12, 300e9, 400),
    Card("h100", "H100", 989e12, int(79.1 * GIB), 3.35e12, 450e9, 700),
    Card("a100-40gb", "A100-SXM4-40GB", 312e12, int(39.4 * GIB), 1.555e12, 300e9, 400),
    Card("a100-pcie-40gb", "A100-PCIE-40GB", 312e12, int(39.4 * GIB), 1.555e12, 32e9, 250),
    Card("a100-pcie", "A100 80GB PCIe", 312e12, int(79.1 * GIB), 1.935e12, 32e9, 300),
    Card("a100", "A100", 312e12, int(79.1 * GIB), 2.039e12, 300e9, 400),
    Card("l40s", "L40S", 362e12, int(44.3 * GIB), 0.864e12, 32e9, 350),
    Card("5090", "RTX 5090", 209.5e12, int(31.3 * GIB), 1.792e12, 64e9, 575),
    Card("4090", "RTX 4090", 165.2e12, int(23.5 * GIB), 1.008e12, 32e9, 450),
    Card("3090", "RTX 3090", 71e12, int(23.5 * GIB), 0.936e12, 32e9, 350),
)


def card(name: str) -> Card:
    """The card of that name, as `h100` or `RTX-4090`. Raises ConfigError naming those that are known."""
    wanted = name.lower().replace(" ", "-").removeprefix("rtx-")
    for found in CARDS:
        if found.name == wanted:
            return found
    names = [one.name for one in CARDS]
    raise ConfigError(f"--gpu {name[:40]}{did_you_mean(wanted[:40], names)} Accepted: {', '.join(names)}")


def card_of_device(device_name: str) -> Card | None:
    """The card that a driver's name belongs to, as "NVIDIA H100 80GB HBM3"; None where it is not known.

    A name that goes on is another card ("RTX 4090 Laptop GPU", "H200 NVL", "RTX 3090 Ti"), unless by its memory; a part
    of a card, by MIG, has other rates.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((one for one in CARDS if re.search(rf"\b{one.device_name}($|-| \d+ ?GB\b)", device_name)), None)
