"""Fused causal attention with trainable sinks on a CPU, on PyTorch's own flash kernel.

A sink is a logit s that joins the softmax's denominator and carries no value. With O and lse the kernel's output and
log-sum-exp without it,

    lse' = logaddexp(lse, s),    O' = O · exp(lse − lse').

The backward of flash attention rebuilds the probabilities as exp(scores − lse) and takes rowsum(dO ∘ O) for the
softmax's Jacobian, so calling it with (O', lse') gives the exact dq, dk and dv; and

    ds = −Σ exp(s − lse') · rowsum(dO ∘ O')

over all rows and queries. `p828.model.attention.reference_attention` is the plain twin.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class FlashAttentionCPU(torch.autograd.Function):
    """CPU: sequences of equal length, heads before tokens, an additive mask (B, 1, S, C) or plain causal.

    Fewer queries than keys, as a later piece of a prompt has, come with a mask.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BNSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, sinks_N: Tensor | None, mask_B1SC: Tensor | None
    ) -> Tensor:
        out_BNSD, lse_BNS = aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNSD, k_BGCD, v_BGCD, 0.0, _is_causal(q_BNSD, k_BGCD), attn_mask=mask_B1SC
        )
        if sinks_N is not None:
            lse_BNS, shrink_BNS = _join(lse_BNS, sinks_N[:, None])
            shrunk_BNSD = out_BNSD * shrink_BNS[..., None]
            # PyTorch 2.11 gives a compiled function that returns an unchanged `to` of a tensor gradients of 0.
            out_BNSD = shrunk_BNSD if shrunk_BNSD.dtype == out_BNSD.dtype else shrunk_BNSD.to(out_BNSD.dtype)
        ctx.save_for_backward(q_BNSD, k_BGCD, v_BGCD, sinks_N, out_BNSD, lse_BNS, mask_B1SC)
        return out_BNSD

    @staticmethod
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor | None, ...]:
        q_BNSD, k_BGCD, v_BGCD, sinks_N, out_BNSD, lse_BNS, mask_B1SC = ctx.saved_tensors
        dq_BNSD, dk_BGCD, dv_BGCD = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BNSD, q_BNSD, k_BGCD, v_BGCD, out_BNSD, lse_BNS, 0.0, _is_causal(q_BNSD, k_BGCD), attn_mask=mask_B1SC
        )
        dsinks_N = None
        if sinks_N is not None:
            dot_BNS = (grad_BNSD.float() * out_BNSD.float()).sum(-1)
            dsinks_N = -(torch.exp(sinks_N[:, None] - lse_BNS) * dot_BNS).sum((0, 2))
        return dq_BNSD, dk_BGCD, dv_BGCD, dsinks_N, None


def _is_causal(q_BNSD: Tensor, k_BGCD: Tensor) -> bool:
    """Whether the kernel leaves later keys out by itself, beside the mask: it takes the first query to be key 0's."""
    return q_BNSD.shape[2] == k_BGCD.shape[2]


def _join(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """lse' with the sinks in the denominator, and the factor exp(lse − lse') that shrinks the output."""
    joined = torch.logaddexp(lse, sinks)
    return joined, torch.exp(lse - joined)
