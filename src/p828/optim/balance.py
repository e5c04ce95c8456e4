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
    biases, bias_LE, loads_LE = _biases(model), stacked_biases(model), loads_LE.float()
    moved_LE = bias_LE + rate * torch.sign(loads_LE.mean(dim=1, keepdim=True) - loads_LE)
    moved_LE -= moved_LE.mean(dim=1, keepdim=True)
    torch._foreach_copy_(biases, list(torch.where(applied, moved_LE, bias_LE)))


def stacked_biases(model: Transformer) -> Tensor:
    """A copy of all layers' balance biases: float32 (L, E)."""
    return torch.stack(_biases(model))


def bias_numbers(before_LE: Tensor, after_LE: Tensor, loads_LE: Tensor) -> dict[str, Tensor]:
    """What an update did to the biases, by the names of a step's record: (L,) each.

    `bias_load_correlation` is that of a bias's change with how far its expert's load is under the mean, over a layer's
    experts: near 1 if the bias raises what has too little, near -1 with the wrong sign, 0 if it stays where it is.
    """
    moved_LE = _centred(after_LE.double() - before_LE.double())
    missing_LE = -_centred(loads_LE.double())
    norms_L = torch.linalg.vector_norm(moved_LE, dim=1) * torch.linalg.vector_norm(missing_LE, dim=1)
    return {
        "bias_max": after_LE.abs().amax(dim=1),
        "bias_load_correlation": (moved_LE * missing_LE).sum(dim=1) / norms_L.clamp_min(torch.finfo(torch.double).tiny),
    }


def _centred(x_LE: Tensor) -> Tensor:
    return x_LE - x_LE.mean(dim=1, keepdim=True)


def _biases(model: Transformer) -> list[Tensor]:
    return [layer.mlp.gate.e_score_correction_bias for layer in model.layers]
