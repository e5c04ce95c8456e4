"""Load balance without an auxiliary loss (arXiv 2408.15664)."""

import torch
from torch import Tensor

from p828.model.transformer import Transformer


@torch.no_grad()
def update_biases(model: Transformer, loads_LE: Tensor, rate: float) -> None:
    """Raise the selection bias of experts under the mean load, lower it above, by `rate`; keep its mean at zero.

    `loads_LE` (int64) is the whole step's: all micro-batches, all ranks.
    """
    for layer, load_E in zip(model.layers, loads_LE.float(), strict=True):
        bias_E = layer.mlp.gate.e_score_correction_bias
        bias_E += rate * torch.sign(load_E.mean() - load_E)
        bias_E -= bias_E.mean()
