"""Norms, rotation and causal attention with sinks on the GPU, from one qkv tensor, over documents laid end to end.

A sink is a logit s that joins the softmax's denominator and carries no value: of P = softmax([scores, s]) the output
O = P v takes all columns but the last. With delta = rowsum(dO ∘ O), the gradients are those of attention without sinks
for these P, and ds = −Σ exp(s − lse) · delta over all tokens, where lse is the log-sum-exp with the sink.

The backward pass keeps qkv, the output and lse. It computes normalised and rotated queries and keys again, which costs
a pass over memory; keeping them would take as much memory as qkv. `torch.compile` sees two operations. Triton
is imported inside them: machines without a GPU do not have it. The plain twins are `p828.model.norm.RMSNorm`,
`p828.model.rope.apply_rotary` and `p828.model.attention.reference_attention`.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("p828::attention", mutates_args=())
def attention(
    qkv_TXD: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sinks_N: Tensor | None,
    document_start_T: Tensor,
    document_end_T: Tensor,
    heads: int,
    batch: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Query t sees the keys start[t] … t: (T, N, D) in qkv's dtype; and lse, which the backward pass needs.

    `qkv_TXD` holds N = `heads` query heads, then G key and G value heads; bfloat16, D a multiple of 8 up to
    256. The norms' weights and `sinks_N` are float32, or None for none; `cos` and `sin` are float32 (T, D / 2).
    `document_start_T` and `document_end_T` (int32) are the first token of each token's document and the one past its
    last. `batch` is the number of sequences that the T tokens come from; it decides the order of work and nothing else.
    The second result, float32 (G, Q), holds log₂ Σ 2^(score · log₂ e) for the Q = T·N/G queries of each key head, token
    by token, and up to three numbers of padding, which align its rows.
    """
    from p828.kernels.attention import flash_triton, rope_triton

    qkv_TXD, cos, sin = qkv_TXD.contiguous(), cos.contiguous(), sin.contiguous()
    q_TND, k_TGD = rope_triton.forward(qkv_TXD, q_norm_D, k_norm_D, cos, sin, heads, eps)
    lse_GQ = _empty_lse(qkv_TXD, heads)
    v_TGD = qkv_TXD[:, heads + k_TGD.shape[1] :]
    return flash_triton.forward(q_TND, k_TGD, v_TGD, sinks_N, document_start_T, batch, lse_GQ), lse_GQ


@attention.register_fake
def _(qkv_TXD: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None, cos: Tensor, sin: Tensor,
      sinks_N: Tensor | None, document_start_T: Tensor, document_end_T: Tensor, heads: int, batch: int, eps: float,
      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv_TXD.new_empty(len(qkv_TXD), heads, qkv_TXD.shape[2]), _empty_lse(qkv_TXD, heads)


@torch.library.custom_op("p828::attention_backward", mutates_args=())
def attention_backward(
    grad_TND: Tensor,
    qkv_TXD: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sinks_N: Tensor | None,
    document_start_T: Tensor,
    document_end_T: Tensor,
    out_TND: Tensor,
    lse_GQ: Tensor,
    batch: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv_TXD, q_norm_D, k_norm_D and sinks_N, the last three empty for None. Bit-equal at each call."""
    from p828.kernels.attention import flash_triton, rope_triton

    heads = out_TND.shape[1]
    grad_TND, qkv_TXD, cos, sin = grad_TND.contiguous(), qkv_TXD.contiguous(), cos.contiguous(), sin.contiguous()
    q_TND, k_TGD = rope_triton.forward(qkv_TXD, q_norm_D, k_norm_D, cos, sin, heads, eps)
    v_TGD = qkv_TXD[:, heads + k_TGD.shape[1] :]
    delta_GQ = torch.empty_like(lse_GQ)
    dq_TND = flash_triton.backward_queries(
        grad_TND, q_TND, k_TGD, v_TGD, document_start_T, batch, out_TND, lse_GQ, delta_GQ
    )
    dk_TGD, dv_TGD = flash_triton.backward_keys(grad_TND, q_TND, k_TGD, v_TGD, document_end_T, batch, lse_GQ, delta_GQ)
    dqkv_TXD, dq_norm_D, dk_norm_D = rope_triton.backward(
        dq_TND, dk_TGD, dv_TGD, qkv_TXD, q_norm_D, k_norm_D, cos, sin, eps
    )
    if sinks_N is None:
        dsinks_N = lse_GQ.new_empty(0)
    else:
        dsinks_N = flash_triton.backward_sinks(sinks_N, lse_GQ, delta_GQ, len(qkv_TXD))
    return dqkv_TXD, dq_norm_D, dk_norm_D, dsinks_N


@attention_backward.register_fake
def _(grad_TND: Tensor, qkv_TXD: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None, cos: Tensor, sin: Tensor,
      sinks_N: Tensor | None, document_start_T: Tensor, document_end_T: Tensor, out_TND: Tensor, lse_GQ: Tensor,
      batch: int, eps: float,
      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq_norm_D, dk_norm_D, dsinks_N = (
        lse_GQ.new_empty(0 if x is None else len(x)) for x in (q_norm_D, k_norm_D, sinks_N)
    )
    return qkv_TXD.new_empty(qkv_TXD.shape), dq_norm_D, dk_norm_D, dsinks_N


def _empty_lse(qkv_TXD: Tensor, heads: int) -> Tensor:
    key_heads = (qkv_TXD.shape[1] - heads) // 2
    queries = len(qkv_TXD) * heads // key_heads
    return qkv_TXD.new_empty(key_heads, (queries + 3) // 4 * 4, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.batch, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_TND: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under gradient checkpointing, reading them again computes them again
    q_norm_D, k_norm_D, sinks_N = (saved[i] for i in (1, 2, 5))
    dqkv_TXD, *grads = attention_backward(grad_TND, *saved, ctx.batch, ctx.eps)
    dq_norm_D, dk_norm_D, dsinks_N = (
        None if x is None else grad for x, grad in zip((q_norm_D, k_norm_D, sinks_N), grads, strict=True)
    )
    return dqkv_TXD, dq_norm_D, dk_norm_D, None, None, dsinks_N, None, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup)


def rotated_heads(
    qkv_TXD: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries (T, N, D) and keys (T, G, D) as `attention` sees them, without a gradient."""
    from p828.kernels.attention import rope_triton

    return rope_triton.forward(qkv_TXD.contiguous(), q_norm_D, k_norm_D, cos.contiguous(), sin.contiguous(), heads, eps)


def causal_attention(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, sinks_N: Tensor | None, first_key_T: Tensor
) -> Tensor:
    """`attention` of finished queries and keys, without a gradient: query t sees the keys `first_key_T[t]` … t.

    A query whose first key is behind it sees none, and gets no meaningful numbers.
    """
    from p828.kernels.attention import flash_triton

    groups = k_TGD.shape[1]
    queries = (q_TND.shape[0] * q_TND.shape[1] // groups + 3) // 4 * 4
    lse_GQ = q_TND.new_empty(groups, queries, dtype=torch.float32)
    return flash_triton.forward(q_TND, k_TGD, v_TGD, sinks_N, first_key_T, 1, lse_GQ)
