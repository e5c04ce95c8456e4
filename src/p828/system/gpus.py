"""What the GPU of this process can do at most."""

import torch

from p828.system.cards import card_of_device


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device's datasheet, None where it is not known (MFU is then left out)."""
    if device.type != "cuda":
        return None
    card = card_of_device(torch.cuda.get_device_name(device))
    return None if card is None else card.peak_flops
