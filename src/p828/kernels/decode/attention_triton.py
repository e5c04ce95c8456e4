"""Attention of one new token a sequence over a cache in place: norms, rotation, cache write and softmax in one kernel.

The cached keys of a (sequence, key head) are split among programs; the last of them to arrive joins their softmaxes
(flash decoding). Only the splits that a sequence's length fills take part; the others leave at once, so that one
captured launch serves every length. The new key and value never pass through memory: the last split begins with them.
For a few tokens `split_attention_triton` has kernels of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels

TILES = {"keys": 32, "warps": 1}  # keys of a step of a program
PROGRAMS = 1056  # that the splits aim at, eight on each processor of an H100
MAX_SPLITS = 32
ELEMENTS = 8192  # of the splits' values, that the joining program holds at a time


@triton.jit
def load_rotated(head_at, norm_weight, gain, other_gain, cos, sin, eps, d, mask, D: tl.constexpr):
    """Heads with their norm, rotated in pairs (d, d + D/2), in float32. `d` is of the last dimension."""
    value = tl.load(head_at + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(head_at + (d + D // 2) % D, mask=mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / D + eps)
        value *= scale * gain
        partner *= scale * other_gain
    return value * cos + partner * sin


@triton.jit
def load_gains(norm_weight, d, D: tl.constexpr):
    """A norm's weight at d and at d's partner; without a norm, numbers that nobody reads."""
    gain, other_gain = d, d
    if norm_weight is not None:
        gain = tl.load(norm_weight + d, mask=d < D, other=0.0)
        other_gain = tl.load(norm_weight + (d + D // 2) % D, mask=d < D, other=0.0)
    return gain, other_gain


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
def load_cached(key_at, value_at, block, limit, d, D: tl.constexpr, KEYS: tl.constexpr):
    """A block of cached keys and values, 0 from place `limit` on."""
    key = block * KEYS + tl.arange(0, KEYS)[:, None]
    mask = (key < limit) & (d < D)
    keys = tl.load(key_at + key * D + d, mask=mask, other=0.0)
    return keys, tl.load(value_at + key * D + d, mask=mask, other=0.0)


@triton.jit
def split_size(position, KEYS: tl.constexpr, SPLITS: tl.constexpr):
    """Blocks of keys of a split, and how many splits have any (at least one split takes part)."""
    blocks = tl.cdiv(position, KEYS)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    return each, tl.maximum(tl.cdiv(blocks, each), 1)


@triton.jit
def begin_split(query, own_key, own_value, is_last, HEADS: tl.constexpr, D: tl.constexpr):
    """The running softmax's maximum, sum and values: of the token's own key in the last split, else of nothing.

    Scores are in units of the logarithm to base 2.
    """
    score = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * (D**-0.5 * 1.4426950408889634)
    highest = tl.where(is_last, score, float("-inf"))
    total = tl.where(is_last, 1.0, tl.zeros((HEADS,), tl.float32))
    return highest, total, total[:, None] * own_value.to(tl.float32)


@triton.jit
def attend_cached(
    query, highest, total, result, keys, values, key_at, value_at, block, limit, d,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The running softmax over the cached keys up to `limit`, of which a first block is loaded already."""
    scale = D**-0.5 * 1.4426950408889634
    for now in range(block, tl.cdiv(limit, KEYS)):
        scores = tl.dot(query, tl.trans(keys).to(query.dtype), input_precision="ieee") * scale
        is_cached = now * KEYS + tl.arange(0, KEYS)[None, :] < limit
        scores = tl.where(is_cached, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        result = tl.dot(shares.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
        highest = higher
        keys, values = load_cached(key_at, value_at, now + 1, limit, d, D, KEYS)
    return highest, total, result


@triton.jit
def leave_split(
    highest, total, result, mask, split, active, at, split_values, split_bounds, arrivals, out_at, sinks_at,
    M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    JOINED_HEADS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Leaves a split's sums for the last to arrive, and joins all of them if this is it."""
    head, d = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    values_at, bounds_at = split_values + at * SPLITS * M * D, split_bounds + at * SPLITS * M * 2
    place = split * M + head
    tl.store(values_at + place[:, None] * D + d[None, :], result, mask=mask)
    tl.store(bounds_at + place * 2, highest, mask=head < M)
    tl.store(bounds_at + place * 2 + 1, total, mask=head < M)
    tl.debug_barrier()  # the count is one thread's; it publishes what all of them have written
    if tl.atomic_add(arrivals + at, 1, sem="acq_rel") == active - 1:
        tl.debug_barrier()
        joined = join_splits(values_at, bounds_at, active, M, D, JOINED_HEADS, COLUMNS, SPLITS, STEP)
        store_output(out_at, joined[0], joined[1], joined[2], sinks_at, M, D, JOINED_HEADS, COLUMNS)
        tl.store(arrivals + at, 0)


@triton.jit
def attend(
    qkv, keys, values, slots, positions, frequencies, q_norm, k_norm, sinks, out, split_values, split_bounds, arrivals,
    factor, eps, C, G, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, JOINED_HEADS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_begin(PDL)
    split, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + tl.maximum(slot, 0)).to(tl.int32)
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = (head < M) & (d < D)
    out_at = out + (token * G + group) * M * D
    each, active = split_size(position, KEYS, SPLITS)
    if (slot < 0) | (split >= active):
        if (slot < 0) & (split == 0):
            wait_for_earlier_kernels(PDL)
            tl.store(out_at + head * D + d, tl.zeros((HEADS, COLUMNS), out.dtype.element_ty), mask=mask)
        return

    key_at, value_at = keys + (slot * G + group) * C * D, values + (slot * G + group) * C * D
    block, limit = split * each, tl.minimum((split + 1) * each * KEYS, position)
    key_block, value_block = load_cached(key_at, value_at, block, limit, d, D, KEYS)
    q_gain, q_other_gain = load_gains(q_norm, d, D)
    k_gain, k_other_gain = load_gains(k_norm, d, D)
    angle = position.to(tl.float32) * tl.load(frequencies + d % (D // 2), mask=d < D, other=0.0)
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * tl.where(d < D // 2, -factor, factor)
    wait_for_earlier_kernels(PDL)

    at = qkv + token * (G * M + 2 * G) * D
    query = load_rotated(at + (group * M + head) * D, q_norm, q_gain, q_other_gain, cos, sin, eps, d, mask, D)
    query = query.to(qkv.dtype.element_ty)
    own_key = load_rotated(at + (G * M + group) * D, k_norm, k_gain, k_other_gain, cos, sin, eps, d, d < D, D)
    own_key = own_key.to(keys.dtype.element_ty)
    own_value = tl.load(at + (G * M + G + group) * D + d, mask=d < D, other=0.0).to(values.dtype.element_ty)
    is_last = split == active - 1
    tl.store(key_at + position * D + d, own_key, mask=(d < D) & is_last)
    tl.store(value_at + position * D + d, own_value, mask=(d < D) & is_last)
    highest, total, result = begin_split(query, own_key, own_value, is_last, HEADS, D)
    highest, total, result = attend_cached(
        query, highest, total, result, key_block, value_block, key_at, value_at, block, limit, d, D, KEYS
    )
    sinks_at = None if sinks is None else sinks + group * M
    if active == 1:
        store_output(out_at, highest, total, result, sinks_at, M, D, HEADS, COLUMNS)
    else:
        leave_split(
            highest, total, result, mask, split, active, token * G + group, split_values, split_bounds, arrivals,
            out_at, sinks_at, M, D, HEADS, COLUMNS, SPLITS, JOINED_HEADS, STEP,
        )  # fmt: skip


def attention(
    qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, slots_T: Tensor, position_S: Tensor,
    frequencies: Tensor, factor: float, q_norm_D: Tensor | None, k_norm_D: Tensor | None, sinks_N: Tensor | None,
    eps: float, arrivals_TG: Tensor,
) -> Tensor:  # fmt: skip
    tokens, all_heads, head_dim = qkv_TXD.shape
    groups, length = keys_SGCD.shape[1:3]
    heads = all_heads - 2 * groups
    sharing = heads // groups
    splits = min(max(PROGRAMS // (tokens * groups), 1), triton.cdiv(length, TILES["keys"]), MAX_SPLITS)
    splits = triton.next_power_of_2(splits)
    columns, joined_heads = max(triton.next_power_of_2(head_dim), 16), triton.next_power_of_2(sharing)
    step = min(max(ELEMENTS // (joined_heads * columns), 1), splits)
    split_values = qkv_TXD.new_empty(tokens, groups, splits, sharing, head_dim, dtype=torch.float32)
    split_bounds = qkv_TXD.new_empty(tokens, groups, splits, sharing, 2, dtype=torch.float32)
    out_TX = qkv_TXD.new_empty(tokens, heads * head_dim)
    launch(
        attend, (splits, groups, tokens),
        qkv_TXD, keys_SGCD, values_SGCD, slots_T, position_S, frequencies, q_norm_D, k_norm_D, sinks_N, out_TX,
        split_values, split_bounds, arrivals_TG, factor, eps, length, groups, sharing, head_dim,
        max(joined_heads, 16), columns, TILES["keys"], splits, joined_heads, step,
        device=qkv_TXD.device, rows=tokens, warps=TILES["warps"],
    )  # fmt: skip
    return out_TX
