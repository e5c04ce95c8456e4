"""Cross-entropy over next tokens without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.kernels.cross_entropy import softmax_gradient_
from p828.model.backend import LOSS_CHUNK_TOKENS, LOSS_COLUMNS, adds_products_in_float32

IGNORE = -100


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Σ over valid targets of −log softmax(hidden weightᵀ)[target]: a float32 scalar in nats (float64 for float64).

    Targets of −100 are left out. Without gradients, one chunk's logits exist at a time. With gradients all logits are
    kept: this is the plain twin of `loss_and_gradients`.
    """
    weight_VH = weight_VH.to(hidden_TH.dtype)
    sum_dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
    chunks = (tensor.split(LOSS_CHUNK_TOKENS[hidden_TH.device.type]) for tensor in (hidden_TH, targets_T))
    losses = [
        F.cross_entropy((hidden_cH @ weight_VH.T).to(sum_dtype), targets_c, ignore_index=IGNORE, reduction="sum")
        for hidden_cH, targets_c in zip(*chunks, strict=True)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def token_losses(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """The terms of the sum that `linear_cross_entropy` is, without gradients: float32 (T,), 0 for targets of −100."""
    weight_VH = weight_VH.to(hidden_TH.dtype)
    sum_dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
    chunks = (tensor.split(LOSS_CHUNK_TOKENS[hidden_TH.device.type]) for tensor in (hidden_TH, targets_T))
    losses = [
        F.cross_entropy((hidden_cH @ weight_VH.T).to(sum_dtype), targets_c, ignore_index=IGNORE, reduction="none")
        for hidden_cH, targets_c in zip(*chunks, strict=True)
    ]
    return torch.cat(losses)


@torch.no_grad()
def loss_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, scale: Tensor, dweight_VH: Tensor
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and the gradients of `scale` times it.

    Returns the loss and the gradient of hidden_TH in hidden's dtype, and adds the gradient of weight_VH to dweight_VH.
    `weight_VH` has hidden's dtype; `dweight_VH` and the scalar `scale` are float32 (float64 for float64). The gradients
    of a chunk overwrite its logits. A chunk's part of dweight is added in float32; on a CPU in bfloat16, where there is
    no such product, it is rounded to bfloat16 first.

    The products are made with X logits a token, a multiple of LOSS_COLUMNS: a copy of `weight_VH` is filled up with
    rows of zeros, whose logits are no part of the softmax and have no gradient. Their rows of dweight are not added.
    """
    chunk, columns = LOSS_CHUNK_TOKENS[hidden_TH.device.type], LOSS_COLUMNS[hidden_TH.device.type]
    vocabulary, fill = len(weight_VH), -len(weight_VH) % columns
    whole = vocabulary // columns * columns
    weight_XH = F.pad(weight_VH, (0, 0, 0, fill)) if fill else weight_VH
    logits_CX = hidden_TH.new_empty(min(chunk, len(hidden_TH)), vocabulary + fill)
    dlast_XH = dweight_VH.new_zeros(vocabulary + fill - whole, weight_VH.shape[1])
    dhidden_TH = torch.empty_like(hidden_TH)
    losses = []
    chunks = zip(*(tensor.split(chunk) for tensor in (hidden_TH, targets_T, dhidden_TH)), strict=True)
    for hidden_cH, targets_c, dhidden_cH in chunks:
        logits_cX = torch.mm(hidden_cH, weight_XH.T, out=logits_CX[: len(hidden_cH)])
        losses.append(softmax_gradient_(logits_cX, targets_c, scale, vocabulary))  # logits_cX is their gradient now
        torch.mm(logits_cX, weight_XH, out=dhidden_cH)
        if whole:
            _add_product_(dweight_VH[:whole], logits_cX[:, :whole].T, hidden_cH)
        if fill:
            _add_product_(dlast_XH, logits_cX[:, whole:].T, hidden_cH)
    dweight_VH[whole:] += dlast_XH[: vocabulary - whole]
    return torch.cat(losses).sum(), dhidden_TH


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` times the scalar `scale`, differentiable at the cost of one chunk's logits.

    The gradients are formed in the forward pass, and kept for the backward pass in the dtypes of hidden and weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, scale: Tensor) -> Tensor:
        dweight_VH = torch.zeros_like(weight_VH, dtype=scale.dtype)
        loss, dhidden_TH = loss_and_gradients(hidden_TH, weight_VH.to(hidden_TH.dtype), targets_T, scale, dweight_VH)
        ctx.save_for_backward(dhidden_TH, dweight_VH.to(weight_VH.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden_TH, dweight_VH = ctx.saved_tensors
        return dhidden_TH * grad.to(dhidden_TH.dtype), dweight_VH * grad.to(dweight_VH.dtype), None, None


def _add_product_(sum_VH: Tensor, left_Vc: Tensor, right_cH: Tensor) -> None:
    if sum_VH.dtype == left_Vc.dtype:
        sum_VH.addmm_(left_Vc, right_cH)
    elif adds_products_in_float32(sum_VH.device):
        torch.ops.aten.addmm.dtype_out(sum_VH, left_Vc, right_cH, torch.float32, out=sum_VH)
    else:
        sum_VH.add_(left_Vc @ right_cH)
