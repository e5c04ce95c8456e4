"""Load balance without an auxiliary loss (arXiv 2408.15664)."""

import torch
from torch import Tensor

from p828.model.transformer import Transformer


@torch.no_grad()
def update_biases(model: Transformer, loads_LE: Tensor, rate: float, applied: Tensor) -> None:
    """Raise the selection bias of experts under the mean load, lower it above, by `rate`; keep its mean at zero.

    `loads_LE` (int64) is the whole step's: all micro-batches, all ranks. Where `applied`, a bool scalar on the device,
    is false, nothing changes.
    """
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.layers]
    bias_LE, loads_LE = torch.stack(biases), loads_LE.float()
    moved_LE = bias_LE + rate * torch.sign(loads_LE.mean(dim=1, keepdim=True) - loads_LE)
    moved_LE -= moved_LE.mean(dim=1, keepdim=True)
    torch._foreach_copy_(biases, list(torch.where(applied, moved_LE, bias_LE)))
