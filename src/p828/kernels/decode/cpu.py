"""Products, norms and attention of a decoding step on a CPU, where the calls of a small model cost more than its sums.

The twins are in `plain.py`. All in float32: T tokens, each the newest of its sequence.
"""

import torch
from torch import Tensor

aten = torch.ops.aten

PIECES = 4  # of a matrix: MKL reads one for a single token in one thread, and several in one each
LARGE = 2**19  # numbers of a matrix from which these ways are faster
FEW = 4  # tokens up to which they are


def linear(x_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """x weightᵀ: (T, V), with the matrix read at memory's speed, or close to it, where tokens are few.

    MKL takes a matrix far larger than its caches at a half to a tenth of that speed if the few tokens are on its left.
    """
    tokens, rows = len(x_TH), len(weight_VH)
    if weight_VH.numel() < LARGE or tokens > FEW:
        return x_TH.mm(weight_VH.t())
    if tokens > 1:
        return weight_VH.mm(x_TH.t()).t()
    whole = rows // PIECES * PIECES
    pieces_PXH = weight_VH[:whole].view(PIECES, -1, weight_VH.shape[1])
    out_1V = pieces_PXH.bmm(x_TH.t().expand(PIECES, -1, 1)).view(1, whole)
    return out_1V if whole == rows else torch.cat((out_1V, x_TH.mm(weight_VH[whole:].t())), dim=1)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; `weight` is broadcast."""
    squares = torch.linalg.vecdot(x, x)[..., None]
    return (x * squares.div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


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


def add_expert_(
    out_XH: Tensor, x_XH: Tensor, gate_up_PH: Tensor, down_HI: Tensor, hidden_act: str, weight: float
) -> None:
    """Add weight · down(act(gate x, up x)) to `out_XH`. `hidden_act`: as for `p828.model.experts.activate`."""
    gate_XP, up_XP = linear(x_XH, gate_up_PH).chunk(2, dim=1)
    if hidden_act == "swiglu_of_product":
        gate_XP, up_XP = (gate_XP * up_XP).chunk(2, dim=1)
    inner_XI = torch.nn.functional.silu(gate_XP).mul_(up_XP)
    if down_HI.numel() < LARGE:
        out_XH.addmm_(inner_XI, down_HI.t(), alpha=weight)
    else:
        out_XH.add_(linear(inner_XI, down_HI), alpha=weight)
