"""Attention of one new token a sequence over a cache in place: norms, rotation, cache write and softmax in one kernel.

The cached keys of a (sequence, key head) are split among programs; the last of them to arrive joins their softmaxes
(flash decoding). Only the splits that a sequence's length fills take part; the others leave at once, so that one
captured launch serves every length. The new key and value never pass through memory: the last split begins with them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch_options, wait_for_earlier_kernels

KEYS = 64  # of a step of a program
WARPS = 4
PROGRAMS = 264  # that the splits aim at: two on each processor of an H100
MAX_SPLITS = 32
ELEMENTS = 8192  # of the splits' values, that the joining program holds at a time


@triton.jit
def rotated(head_at, norm_weight, position, frequencies, factor, eps, d, mask, D: tl.constexpr):
    """Heads with their norm, rotated in pairs (d, d + D/2), in float32. `d` is of the last dimension."""
    other = (d + D // 2) % D
    value = tl.load(head_at + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(head_at + other, mask=mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / D + eps)
        value *= scale * tl.load(norm_weight + d, mask=d < D, other=0.0)
        partner *= scale * tl.load(norm_weight + other, mask=d < D, other=0.0)
    angle = position.to(tl.float32) * tl.load(frequencies + d % (D // 2), mask=d < D, other=0.0)
    sign = tl.where(d < D // 2, -1.0, 1.0)
    return value * (tl.cos(angle) * factor) + partner * (sign * tl.sin(angle) * factor)


@triton.jit
def join_splits(
    values_at, bounds_at, active, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The maximum, the sum and the weighted values of the first `active` splits."""
    head, d = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    every = tl.arange(0, SPLITS)
    mask = (every[:, None] < active) & (head[None, :] < M)
    at = bounds_at + (every[:, None] * M + head[None, :]) * 2
    maxima = tl.load(at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
    highest = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp2(maxima - highest[None, :]), 0)
    values = tl.zeros((HEADS, COLUMNS), tl.float32)
    for first in tl.static_range(0, SPLITS, STEP):
        split = first + tl.arange(0, STEP)
        mask = (split[:, None] < active) & (head[None, :] < M)
        at = bounds_at + (split[:, None] * M + head[None, :]) * 2
        factor = tl.exp2(tl.load(at, mask=mask, other=float("-inf"), cache_modifier=".cg") - highest[None, :])
        at = values_at + (split[:, None, None] * M + head[None, :, None]) * D + d[None, None, :]
        mask = mask[:, :, None] & (d[None, None, :] < D)
        values += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg") * factor[:, :, None], 0)
    return highest, total, values


@triton.jit
def store_output(out_at, highest, total, values, sinks_at, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """values / total, with the sinks in the denominator."""
    head, d = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    if sinks_at is not None:
        sink = tl.load(sinks_at + head, mask=head < M, other=0.0).to(tl.float32) * 1.4426950408889634
        with_sink = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - with_sink) + tl.exp2(sink - with_sink)
        values *= tl.exp2(highest - with_sink)[:, None]
    mask = (head[:, None] < M) & (d[None, :] < D)
    at = out_at + head[:, None] * D + d[None, :]
    tl.store(at, (values / total[:, None]).to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def attend(
    qkv, keys, values, slots, positions, frequencies, q_norm, k_norm, sinks, out, split_values, split_bounds, arrivals,
    factor, eps, C, G, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, JOINED_HEADS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, position = tl.load(slots + token).to(tl.int64), tl.load(positions + token).to(tl.int32)
    head, d, key = tl.arange(0, HEADS), tl.arange(0, COLUMNS), tl.arange(0, KEYS)
    heads_mask = (head[:, None] < M) & (d[None, :] < D)
    out_at = out + (token * G + group) * M * D
    blocks = tl.cdiv(position, KEYS)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    active = tl.maximum(tl.cdiv(blocks, each), 1)
    if (slot < 0) | (split >= active):
        if (slot < 0) & (split == 0):
            wait_for_earlier_kernels(PDL)
            zero = tl.zeros((HEADS, COLUMNS), out.dtype.element_ty)
            tl.store(out_at + head[:, None] * D + d[None, :], zero, mask=heads_mask)
        return

    cached = (slot * G + group) * C * D
    key_at = keys + cached + key[:, None] * D + d[None, :]
    value_at = values + cached + key[:, None] * D + d[None, :]
    first = split * each
    mask = (first * KEYS + key[:, None] < position) & (d[None, :] < D)
    tile = tl.load(key_at + first * KEYS * D, mask=mask, other=0.0)
    value_tile = tl.load(value_at + first * KEYS * D, mask=mask, other=0.0)
    wait_for_earlier_kernels(PDL)

    dtype = qkv.dtype.element_ty
    row = qkv + token * (G * M + 2 * G) * D
    query_at = row + (group * M + head[:, None]) * D
    query = rotated(query_at, q_norm, position, frequencies, factor, eps, d[None, :], heads_mask, D).to(dtype)
    scale = D**-0.5 * 1.4426950408889634  # the softmax is of powers of 2
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, COLUMNS), tl.float32)
    if split == active - 1:
        one = d[None, :] < D
        own_at = row + (G * M + group) * D
        own_key = rotated(own_at, k_norm, position, frequencies, factor, eps, d[None, :], one, D)
        own_key = own_key.to(keys.dtype.element_ty)
        own_value = tl.load(row + (G * M + G + group) * D + d[None, :], mask=one, other=0.0)
        own_value = own_value.to(values.dtype.element_ty)
        at = cached + position * D + d[None, :]
        tl.store(keys + at, own_key, mask=one)
        tl.store(values + at, own_value, mask=one)
        highest = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scale
        total += 1.0
        result += own_value.to(tl.float32)

    for block in range(first, tl.minimum(first + each, blocks)):
        scores = tl.dot(query, tl.trans(tile).to(dtype), input_precision="ieee") * scale
        scores = tl.where(block * KEYS + key[None, :] < position, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        result *= shrink[:, None]
        result = tl.dot(shares.to(value_tile.dtype), value_tile, result, input_precision="ieee")
        highest = higher
        mask = ((block + 1) * KEYS + key[:, None] < position) & (d[None, :] < D)
        tile = tl.load(key_at + (block + 1) * KEYS * D, mask=mask, other=0.0)
        value_tile = tl.load(value_at + (block + 1) * KEYS * D, mask=mask, other=0.0)

    sinks_at = None
    if sinks is not None:
        sinks_at = sinks + group * M
    if active == 1:
        store_output(out_at, highest, total, result, sinks_at, M, D, HEADS, COLUMNS)
    else:
        head_of_all = (token * G + group) * SPLITS * M
        values_at, bounds_at = split_values + head_of_all * D, split_bounds + head_of_all * 2
        at = split * M + head
        tl.store(values_at + at[:, None] * D + d[None, :], result, mask=heads_mask)
        tl.store(bounds_at + at * 2, highest, mask=head < M)
        tl.store(bounds_at + at * 2 + 1, total, mask=head < M)
        tl.debug_barrier()  # the count below is one thread's; it publishes what all have written
        arrived = tl.atomic_add(arrivals + token * G + group, 1, sem="acq_rel")
        if arrived == active - 1:
            tl.debug_barrier()
            highest_joined, total_joined, joined = join_splits(
                values_at, bounds_at, active, M, D, JOINED_HEADS, COLUMNS, SPLITS, STEP
            )
            store_output(out_at, highest_joined, total_joined, joined, sinks_at, M, D, JOINED_HEADS, COLUMNS)
            tl.store(arrivals + token * G + group, 0)


def attention(
    qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, slots_T: Tensor, positions_T: Tensor,
    frequencies: Tensor, factor: float, q_norm_D: Tensor | None, k_norm_D: Tensor | None, sinks_N: Tensor | None,
    eps: float, arrivals_TG: Tensor,
) -> Tensor:  # fmt: skip
    tokens, all_heads, head_dim = qkv_TXD.shape
    groups, length = keys_SGCD.shape[1:3]
    heads = all_heads - 2 * groups
    sharing = heads // groups
    splits = min(max(PROGRAMS // (tokens * groups), 1), triton.cdiv(length, KEYS), MAX_SPLITS)
    splits = triton.next_power_of_2(splits)
    columns, joined_heads = max(triton.next_power_of_2(head_dim), 16), triton.next_power_of_2(sharing)
    step = min(max(ELEMENTS // (joined_heads * columns), 1), splits)
    float32 = {"dtype": torch.float32, "device": qkv_TXD.device}
    split_values = torch.empty(tokens, groups, splits, sharing, head_dim, **float32)
    split_bounds = torch.empty(tokens, groups, splits, sharing, 2, **float32)
    out_TX = torch.empty(tokens, heads * head_dim, dtype=qkv_TXD.dtype, device=qkv_TXD.device)
    attend[(splits, groups, tokens)](
        qkv_TXD, keys_SGCD, values_SGCD, slots_T, positions_T, frequencies, q_norm_D, k_norm_D, sinks_N, out_TX,
        split_values, split_bounds, arrivals_TG, factor, eps, length, groups, sharing, head_dim,
        max(joined_heads, 16), columns, KEYS, splits, joined_heads, step, **launch_options(qkv_TXD.device, WARPS),
    )  # fmt: skip
    return out_TX
