"""Losses and the logits' gradient from the logits in one operation, without another tensor of their size.

The Triton form is in `cross_entropy_triton`, imported only when the logits are on a GPU.
"""

import torch
from torch import Tensor


def softmax_gradient_(logits_cX: Tensor, targets_c: Tensor, scale: Tensor, vocabulary: int | None = None) -> Tensor:
    """Overwrite the logits by the gradient of scale · Σ loss, scale · (softmax − onehot(target)); return the losses.

    `logits_cX` is contiguous, of any floating dtype; `targets_c` int64. Of each row the first `vocabulary` (all, unless
    given) are logits; padding behind them is no part of the softmax, and zero afterwards. The losses (c,) are in
    float32 (float64 for float64), and so is all arithmetic. `scale` is a scalar of that dtype on the same device, so
    that a captured CUDA graph can be replayed with another value. A negative target has no loss and a zero gradient.
    """
    vocabulary = logits_cX.shape[1] if vocabulary is None else vocabulary
    if logits_cX.is_cuda:
        from p828.kernels.cross_entropy_triton import softmax_gradient_triton_

        return softmax_gradient_triton_(logits_cX, targets_c, scale, vocabulary)
    return softmax_gradient_plain_(logits_cX, targets_c, scale, vocabulary)


def softmax_gradient_plain_(logits_cX: Tensor, targets_c: Tensor, scale: Tensor, vocabulary: int) -> Tensor:
    """The plain twin, in as few passes over the logits as a CPU allows."""
    logits_cV, filled_up = logits_cX.split((vocabulary, logits_cX.shape[1] - vocabulary), dim=1)
    filled_up.zero_()
    x_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))  # the logits themselves in a float32 run
    is_target_c1 = (targets_c >= 0)[:, None].to(x_cV.dtype)
    target_c1 = targets_c.clamp_min(0)[:, None]
    x_cV.sub_(x_cV.amax(dim=1, keepdim=True))
    chosen_c1 = x_cV.gather(1, target_c1)
    sum_c1 = x_cV.exp_().sum(dim=1, keepdim=True)
    scale_c1 = scale * is_target_c1
    x_cV.mul_(scale_c1 / sum_c1).scatter_add_(1, target_c1, -scale_c1)
    logits_cV.copy_(x_cV)
    return ((sum_c1.log() - chosen_c1) * is_target_c1)[:, 0]
