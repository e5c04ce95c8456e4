"""How fast this device multiplies matrices and moves bytes, against its datasheet."""

import torch

from p828.distributed.links import nvidia_smi
from p828.doctor.check import Check
from p828.system.cards import Card, card_of_device
from p828.system.device import explain_out_of_memory
from p828.system.timing import host_copy_rates, matmul_flops, memory_rate

# Fractions of the datasheet under which something is wrong: a good part of what healthy cards reach (docs/doctor.md has
# what was measured) is then taken by another program, or by a limit of power or heat.
LEAST_MATMUL = 0.5
LEAST_MEMORY = 0.7
LEAST_COPY = 0.5
PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second of one lane in one direction, by PCIe's generation, after its encoding (PCI-SIG)."""
COOLING = (
    "nvidia-smi -q -d PERFORMANCE says what slows the card (heat, power, another program); power.limit may be lowered"
)


def check_rates(device: torch.device) -> list[Check]:
    """A large matrix product, memory, and on a GPU copies from and to the host. Takes a second or two."""
    with explain_out_of_memory("measuring", "End what else is using the device"):
        if device.type != "cuda":
            return _of_cpu(device)
        with torch.cuda.device(device):
            checks = [_matmul(device), _memory(device), *_copies(device)]
            torch.cuda.empty_cache()
            return checks


def _of_cpu(device: torch.device) -> list[Check]:
    return [
        Check("cpu matmul", "ok", f"{matmul_flops(device) / 1e9:,.0f} GFLOP/s in float32"),
        Check("cpu memory", "ok", f"{memory_rate(device) / 1e9:,.1f} GB/s"),
    ]


def _matmul(device: torch.device) -> Check:
    rate, card = matmul_flops(device), card_of(device)
    shown = f"{rate / 1e12:,.0f} TFLOP/s in bfloat16"
    return against(f"gpu {device.index} matmul", shown, rate, card and card.peak_flops, LEAST_MATMUL, COOLING)


def _memory(device: torch.device) -> Check:
    rate, card = memory_rate(device), card_of(device)
    shown = f"{rate / 1e9:,.0f} GB/s"
    return against(f"gpu {device.index} memory rate", shown, rate, card and card.memory_rate, LEAST_MEMORY, COOLING)


def _copies(device: torch.device) -> list[Check]:
    """Between the host and the GPU, both ways, and whether PCIe has all of its lanes."""
    name = f"gpu {device.index} host copy"
    generation, width, most_width = pcie_of(device)
    to_device, from_device = host_copy_rates(device)
    shown = f"{to_device / 1e9:.1f} GB/s to the GPU, {from_device / 1e9:.1f} GB/s back"
    if width and width < most_width:
        return [
            Check(
                name, "warning", f"{shown}; PCIe has {width} of {most_width} lanes",
                "another slot or riser has all lanes; batches and offloading are slower, the rest is not",
            )
        ]  # fmt: skip
    most = PCIE_LANE[generation] * width if width and generation in PCIE_LANE else None
    remedy = "another program may be copying; in a virtual machine pinned memory may be slow"
    return [against(name, shown, min(to_device, from_device), most, LEAST_COPY, remedy)]


def card_of(device: torch.device) -> Card | None:
    """Its datasheet; None where p828 does not know it."""
    return card_of_device(torch.cuda.get_device_name(device))


def pcie_of(device: torch.device) -> tuple[int, int, int]:
    """PCIe's generation, its lanes and how many the card has; zeros where nvidia-smi does not tell."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    fields = "pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
    line = nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{uuid}").strip()
    numbers = [part.strip() for part in line.split(",")]
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        return 0, 0, 0
    generation, width, most_width = map(int, numbers)
    return generation, width, most_width


def against(name: str, shown: str, rate: float, most: float | None, least: float, remedy: str) -> Check:
    """A measured rate as a fraction of the datasheet's, which may not be known."""
    if most is None:
        return Check(name, "ok", f"{shown}; its datasheet is not known to p828")
    text = f"{shown}, {rate / most:.0%} of the datasheet"
    if rate < least * most:
        return Check(name, "warning", f"{text}; at least {least:.0%} is usual", remedy)
    return Check(name, "ok", text)
