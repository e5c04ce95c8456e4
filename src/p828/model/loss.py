"""Cross-entropy over next tokens without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK_TOKENS = 2048

# (hidden_cH, weight_VH, targets_c) -> (loss sum, dhidden_cH, dweight_VH) of one chunk of c tokens
ChunkGradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_gradients: ChunkGradients | None = None
) -> Tensor:
    """Σ over valid targets of −log softmax(hidden weightᵀ)[target]: a float32 scalar in nats.

    Targets of −100 are left out. Runs over chunks of tokens; under autograd the gradients are formed in the same pass,
    while a chunk's logits are there, so that nothing of size T × V is kept. `chunk_gradients` may be a compiled
    `chunk_loss_and_gradients`.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    if needs_gradient:
        return _LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T, chunk_gradients or chunk_loss_and_gradients)
    weight_VH = weight_VH.to(hidden_TH.dtype)
    total = torch.zeros((), dtype=_sum_dtype(hidden_TH), device=hidden_TH.device)
    for hidden_cH, targets_c in zip(hidden_TH.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True):
        total += chunk_loss(hidden_cH, weight_VH, targets_c)
    return total


def chunk_loss(hidden_cH: Tensor, weight_VH: Tensor, targets_c: Tensor) -> Tensor:
    logits_cV = (hidden_cH @ weight_VH.T).to(_sum_dtype(hidden_cH))
    valid_c = targets_c != IGNORE
    chosen_c = logits_cV.gather(1, targets_c.clamp_min(0)[:, None])[:, 0]
    return ((logits_cV.logsumexp(dim=-1) - chosen_c) * valid_c).sum()


def chunk_loss_and_gradients(hidden_cH: Tensor, weight_VH: Tensor, targets_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk's loss with its gradients: d logits = softmax − onehot(target), zero where there is no target."""
    logits_cV = (hidden_cH @ weight_VH.T).to(_sum_dtype(hidden_cH))
    valid_c = targets_c != IGNORE
    target_c1 = targets_c.clamp_min(0)[:, None]
    lse_c = logits_cV.logsumexp(dim=-1)
    loss = ((lse_c - logits_cV.gather(1, target_c1)[:, 0]) * valid_c).sum()
    # An infinite log-sum-exp makes the softmax of a row without a target zero.
    softmax_cV = logits_cV.sub_(lse_c.masked_fill(~valid_c, float("inf"))[:, None]).exp_()
    dlogits_cV = softmax_cV.scatter_add_(1, target_c1, -valid_c[:, None].to(softmax_cV.dtype)).to(hidden_cH.dtype)
    return loss, dlogits_cV @ weight_VH, dlogits_cV.T @ hidden_cH


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_gradients: ChunkGradients
    ) -> Tensor:
        compute_VH = weight_VH.to(hidden_TH.dtype)
        total = torch.zeros((), dtype=_sum_dtype(hidden_TH), device=hidden_TH.device)
        dhidden_TH, dweight_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        chunks = (tensor.split(CHUNK_TOKENS) for tensor in (hidden_TH, targets_T, dhidden_TH))
        for hidden_cH, targets_c, dhidden_cH in zip(*chunks, strict=True):
            loss, dhidden, dweight = chunk_gradients(hidden_cH, compute_VH, targets_c)
            total += loss
            dhidden_cH.copy_(dhidden)
            dweight_VH += dweight
        ctx.save_for_backward(dhidden_TH, dweight_VH)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TH, dweight_VH = ctx.saved_tensors
        return dhidden_TH * grad.to(dhidden_TH.dtype), dweight_VH * grad, None, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
