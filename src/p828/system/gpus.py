"""What a GPU can do at most, by its model."""

import torch

# Dense bfloat16 peak in FLOP/s from the vendor's datasheets, by what torch.cuda.get_device_name() contains.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip
# Bytes a second between the GPU and its memory, likewise. Of a name with several parts the first entry counts.
MEMORY_BANDWIDTH = {
    "B200": 8000e9, "GH200": 4000e9, "H200": 4800e9, "H100 PCIe": 2000e9, "H100 NVL": 3900e9, "H100": 3350e9,
    "A100-SXM4-80GB": 2039e9, "A100 80GB PCIe": 1935e9, "A100": 1555e9, "L40S": 864e9,
    "RTX 5090": 1792e9, "RTX 4090": 1008e9, "RTX 3090": 936e9,
}  # fmt: skip
# Bytes a second of one NVLink in one direction, likewise: half of what datasheets give, which is both directions.
NVLINK_BANDWIDTH = {
    "B200": 50e9, "GH200": 25e9, "H200": 25e9, "H100": 25e9, "A100": 25e9, "V100": 25e9, "RTX 3090": 14e9,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device's datasheet, None where it is not known (MFU is then left out)."""
    if device.type != "cuda":
        return None
    return _found(PEAK_FLOPS, torch.cuda.get_device_name(device))


def memory_bandwidth(name: str) -> float | None:
    """Bytes a second of the memory of a GPU of this name, None where it is not known."""
    return _found(MEMORY_BANDWIDTH, name)


def nvlink_bandwidth(name: str) -> float | None:
    """Bytes a second of one NVLink, in one direction, of a GPU of this name, None where it is not known."""
    return _found(NVLINK_BANDWIDTH, name)


def _found(rates: dict[str, float], name: str) -> float | None:
    return next((rate for part, rate in rates.items() if part in name), None)
