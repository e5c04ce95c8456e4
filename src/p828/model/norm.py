"""Root mean square layer normalisation (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.kernels.norm import add_rms_norm, rms_norm
from p828.model.backend import uses_triton


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; accumulates in float32, returns x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if uses_triton(x.device, x.dtype):
            return rms_norm(x, self.weight.float(), self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class ResidualNorm(RMSNorm):
    """The deferred residual add, fused with the norm: returns x + delta and its normalisation."""

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if uses_triton(x.device, x.dtype):
            return add_rms_norm(x, delta, self.weight.float(), self.eps)
        total = x + delta
        return total, super().forward(total)
