"""RMS normalisation of each query and key head, if any, and rotation, in one pass.

Why our own: the kernel reads the heads from the projections' output, and its backward pass writes the gradient in the
layout of that output, without the copies of joining and splitting tensors. It is cheap enough to be run again in the
backward pass instead of keeping its result.

Works on the heads of one qkv tensor (T, X, D): N query heads, G key heads, then the value heads, which stay as they
are. The plain twins are `p828.model.norm.RMSNorm` and `p828.model.rope.apply_rotary`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
PROGRAMS = 64  # of the backward pass, for each head


@triton.jit
def load_head(at, row, T, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """The two halves of a head in float32, and where they may be read."""
    pair = tl.arange(0, WIDTH)[None, :]
    mask = (row < T) & (pair < HALF)
    first = tl.load(at + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    return first, second, pair, mask


@triton.jit
def rope_forward(
    qkv, q_weight, k_weight, cos, sin, out, eps, T, N, ready, X,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[t, head] for the `ready` = N + G heads of queries and keys."""
    row, head = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64), tl.program_id(1)
    first, second, pair, mask = load_head(qkv + (row * X + head) * 2 * HALF, row, T, HALF, WIDTH)
    if HAS_NORM:
        weight = tl.where(head < N, q_weight, k_weight)
        squares = tl.sum(first * first + second * second, 1, keep_dims=True)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)
        first *= scale * tl.load(weight + pair, mask=pair < HALF, other=0.0)
        second *= scale * tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0)
    c, s = (
        tl.load(cos + row * HALF + pair, mask=mask, other=0.0),
        tl.load(sin + row * HALF + pair, mask=mask, other=0.0),
    )
    to = out + (row * ready + head) * 2 * HALF + pair
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rope_backward(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, dweights, eps, T, N, ready, X,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dqkv[t, head]; and of heads that are normalised each program's share of the weight's gradient."""
    head, G = tl.program_id(1), ready - N
    weight = tl.where(head < N, q_weight, k_weight)
    dfirst_weight, dsecond_weight = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        if head < N:
            at = dq + (row * N + head) * 2 * HALF
        elif head < ready:
            at = dk + (row * G + head - N) * 2 * HALF
        else:
            at = dv + (row * G + head - ready) * 2 * HALF
        dfirst, dsecond, pair, mask = load_head(at, row, T, HALF, WIDTH)
        if head < ready:
            c = tl.load(cos + row * HALF + pair, mask=mask, other=0.0)
            s = tl.load(sin + row * HALF + pair, mask=mask, other=0.0)
            dfirst, dsecond = dfirst * c + dsecond * s, dsecond * c - dfirst * s
            if HAS_NORM:
                x, y, pair, mask = load_head(qkv + (row * X + head) * 2 * HALF, row, T, HALF, WIDTH)
                scale = tl.rsqrt(tl.sum(x * x + y * y, 1, keep_dims=True) / (2 * HALF) + eps)
                x, y = x * scale, y * scale
                dfirst_weight += dfirst * x
                dsecond_weight += dsecond * y
                dfirst *= tl.load(weight + pair, mask=pair < HALF, other=0.0)
                dsecond *= tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0)
                along = tl.sum(dfirst * x + dsecond * y, 1, keep_dims=True) / (2 * HALF)
                dfirst, dsecond = scale * (dfirst - x * along), scale * (dsecond - y * along)
        to = dqkv + (row * X + head) * 2 * HALF + pair
        tl.store(to, dfirst.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(to + HALF, dsecond.to(dqkv.dtype.element_ty), mask=mask)
    if HAS_NORM:
        pair = tl.arange(0, WIDTH)[None, :]
        to = dweights + (tl.program_id(0) * X + head) * 2 * HALF + pair
        tl.store(to, tl.sum(dfirst_weight, 0, keep_dims=True), mask=pair < HALF)
        tl.store(to + HALF, tl.sum(dsecond_weight, 0, keep_dims=True), mask=pair < HALF)


def forward(
    qkv_TXD: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries (T, N, D) and keys (T, G, D), slices of one tensor. The norms' weights are float32."""
    tokens, total, head_dim = qkv_TXD.shape
    ready = heads + (total - heads) // 2
    out = qkv_TXD.new_empty(tokens, ready, head_dim)
    has_norm = q_norm_D is not None
    rope_forward[(triton.cdiv(tokens, ROWS), ready)](
        qkv_TXD, *((q_norm_D, k_norm_D) if has_norm else (cos, cos)), cos, sin, out, eps, tokens, heads, ready, total,
        head_dim // 2, triton.next_power_of_2(head_dim // 2), has_norm, ROWS,
    )  # fmt: skip
    return out[:, :heads], out[:, heads:]


def backward(
    dq_TND: Tensor, dk_TGD: Tensor, dv_TGD: Tensor, qkv_TXD: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of qkv and of the norms' weights, empty without norms."""
    (tokens, total, head_dim), heads = qkv_TXD.shape, dq_TND.shape[1]
    ready = heads + dk_TGD.shape[1]
    has_norm = q_norm_D is not None
    dqkv_TXD = torch.empty_like(qkv_TXD)
    dweights_XD = cos.new_empty(PROGRAMS, total if has_norm else 0, head_dim)
    rope_backward[(PROGRAMS, total)](
        dq_TND, dk_TGD, dv_TGD, qkv_TXD, *((q_norm_D, k_norm_D) if has_norm else (cos, cos)), cos, sin,
        dqkv_TXD, dweights_XD, eps, tokens, heads, ready, total,
        head_dim // 2, triton.next_power_of_2(head_dim // 2), has_norm, ROWS,
    )  # fmt: skip
    if not has_norm:
        return dqkv_TXD, cos.new_empty(0), cos.new_empty(0)
    dweights_XD = dweights_XD.sum(0)
    return dqkv_TXD, dweights_XD[:heads].sum(0), dweights_XD[heads:ready].sum(0)
