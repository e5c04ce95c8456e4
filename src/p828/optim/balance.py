"""Load balance without an auxiliary loss (arXiv 2408.15664)."""

import torch
from torch import Tensor

from p828.model.transformer import Transformer


@torch.no_grad()
def update_biases(model: Transformer, loads_LE: Tensor, rate: float, applied: Tensor) -> None:
    """Raise the selection bias of experts under their layer's mean load by `rate`, and lower it for those above.

    Then the mean over a layer's experts is taken off, so that it stays zero. `loads_LE` (int64) counts the whole step:
    all micro-batches, all ranks. Nothing changes where `applied`, a bool scalar on the device, is false.
    """
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.layers]
    bias_LE, loads_LE = torch.stack(biases), loads_LE.float()
    moved_LE = bias_LE + rate * torch.sign(loads_LE.mean(dim=1, keepdim=True) - loads_LE)
    moved_LE -= moved_LE.mean(dim=1, keepdim=True)
    torch._foreach_copy_(biases, list(torch.where(applied, moved_LE, bias_LE)))
