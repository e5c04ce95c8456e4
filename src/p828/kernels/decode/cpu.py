"""Products, norms and attention of a decoding step on a CPU, where the calls of a small model cost more than its sums.

All in float32: T tokens, each the newest of its sequence.
"""

import torch
from torch import Tensor

aten = torch.ops.aten

PIECES = 4  # of a matrix: MKL reads one for a single token in one thread, and several in one each
FEW = 4  # tokens up to which a matrix is better on the left
LARGE = 2**18  # numbers of a matrix from which it is better in pieces, for one token
MEDIUM = 2**16  # and from which on the left, for a few


class Matrix:
    """A weight (V, H), prepared for products with few tokens.

    MKL reads a matrix far larger than its caches well below memory's speed if few tokens stand on its left, as they do
    in `x weightᵀ`.
    """

    def __init__(self, weight_VH: Tensor) -> None:
        self.weight_VH, self.weight_HV = weight_VH, weight_VH.t()
        self.is_large, self.is_medium = weight_VH.numel() >= LARGE, weight_VH.numel() >= MEDIUM
        whole = len(weight_VH) // PIECES * PIECES
        self.pieces_PXH = weight_VH[:whole].view(PIECES, -1, weight_VH.shape[1])
        self.rest_HX = self.weight_HV[:, whole:]

    def __call__(self, x_TH: Tensor) -> Tensor:
        """x weightᵀ: (T, V)."""
        tokens = x_TH.shape[0]
        if tokens > FEW or not (self.is_large if tokens == 1 else self.is_medium):
            return x_TH.mm(self.weight_HV)
        if tokens > 1:
            return self.weight_VH.mm(x_TH.t()).t()
        out_1V = self.pieces_PXH.bmm(x_TH.t().expand(PIECES, -1, 1)).view(1, -1)
        return torch.cat((out_1V, x_TH.mm(self.rest_HX)), dim=1) if self.rest_HX.shape[1] else out_1V

    def add_product_(self, out_TV: Tensor, x_TH: Tensor, factor: float) -> None:
        """Add factor · x weightᵀ to `out_TV`."""
        if self.is_medium:
            out_TV.add_(self(x_TH), alpha=factor)
        else:
            out_TV.addmm_(x_TH, self.weight_HV, alpha=factor)


class Norm:
    """RMSNorm over the last dimension."""

    def __init__(self, weight_H: Tensor, eps: float) -> None:
        self.weight_H, self.eps = weight_H, eps
        self.zeros_1H = torch.zeros(1, len(weight_H))

    def __call__(self, x: Tensor) -> Tensor:
        width = len(self.weight_H)
        if x.shape == self.zeros_1H.shape:  # of one token the host takes the root, which is half the operations
            scale = (x.mm(x.t()).item() / width + self.eps) ** -0.5
            return torch.addcmul(self.zeros_1H, x, self.weight_H, value=scale)
        squares = torch.linalg.vecdot(x, x)[..., None]
        return (x * squares.div_(width).add_(self.eps).rsqrt_()).mul_(self.weight_H)


def rotate(x_TXD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """The pairs (i, i + D/2) of every head, rotated. The sine's first half has the opposite sign."""
    return torch.addcmul(x_TXD * cos_T1D, x_TXD.roll(x_TXD.shape[-1] // 2, -1), sin_T1D)


def attend(
    q_TGMD: Tensor, keys_TGCD: Tensor, values_TGCD: Tensor, sinks_GM: Tensor | None, mask_T1MC: Tensor | None
) -> Tensor:
    """softmax([q kᵀ / sqrt(D), sink]) v without the sink's column: (T, G, M, D), for M query heads of a key head.

    `mask_T1MC` (float32) is added to the scores. With the kernel's O and log-sum-exp, a sink s leaves
    O · exp(lse) / (exp(lse) + exp(s)).
    """
    out_TGMD, lse_TGM = aten._scaled_dot_product_flash_attention_for_cpu(
        q_TGMD, keys_TGCD, values_TGCD, 0.0, False, attn_mask=mask_T1MC
    )
    return out_TGMD if sinks_GM is None else out_TGMD.mul_(lse_TGM.sub_(sinks_GM).sigmoid_()[..., None])
