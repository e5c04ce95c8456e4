"""What a GPU can do at most, by its model."""

import torch

# Dense bfloat16 peak in FLOP/s from the vendor's datasheets, by what torch.cuda.get_device_name() contains.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device's datasheet, None where it is not known (MFU is then left out)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
