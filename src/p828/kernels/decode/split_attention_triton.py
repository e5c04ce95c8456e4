"""Attention of a few tokens and its output projection, in two kernels that wait little for each other.

As in `attention_triton` the cached keys are split among programs, here of one warp and for one query head. No program
waits for another to join the splits' softmaxes: each program of the output projection joins them for itself, and reads
some kilobytes from the L2 cache for it. What the heads of a key head add is a part, which `route_triton` sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.attention_triton import load_cached, load_gains, load_rotated, split_size
from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels

KEYS = 32  # of a step of a program
MAX_SPLITS = 64
PROGRAMS = 1056  # that the splits aim at, eight on each processor of an H100
ROWS = 32  # of the output projection, of a program
MOST_COLUMNS = 1024  # of theirs: a product of so many takes 64 kB of shared memory, which every device has
WARPS = 4


@triton.jit
def attend_split(
    qkv, keys, values, slots, positions, frequencies, q_norm, k_norm, split_values, split_bounds, factor, eps, C, G,
    M: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The mean of a split's values, its maximum and its sum, of one head. Scores are in units of log 2."""
    let_next_kernel_begin(PDL)
    split, head, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + tl.maximum(slot, 0)).to(tl.int32)
    each, active = split_size(position, KEYS, SPLITS)
    if (slot < 0) | (split >= active):
        return
    group, d = head // M, tl.arange(0, COLUMNS)[None, :]
    key_at, value_at = keys + (slot * G + group) * C * D, values + (slot * G + group) * C * D
    block, limit = split * each, tl.minimum((split + 1) * each * KEYS, position)
    key_block, value_block = load_cached(key_at, value_at, block, limit, d, D, KEYS)
    q_gain, q_other_gain = load_gains(q_norm, d, D)
    k_gain, k_other_gain = load_gains(k_norm, d, D)
    angle = position.to(tl.float32) * tl.load(frequencies + d % (D // 2), mask=d < D, other=0.0)
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * tl.where(d < D // 2, -factor, factor)
    wait_for_earlier_kernels(PDL)

    at = qkv + token * (G * M + 2 * G) * D
    query = load_rotated(at + head * D, q_norm, q_gain, q_other_gain, cos, sin, eps, d, d < D, D)
    query = query.to(qkv.dtype.element_ty).to(tl.float32) * (D**-0.5 * 1.4426950408889634)
    highest, total = float("-inf"), 0.0
    result = tl.zeros((1, COLUMNS), tl.float32)
    if split == active - 1:
        own_key = load_rotated(at + (G * M + group) * D, k_norm, k_gain, k_other_gain, cos, sin, eps, d, d < D, D)
        own_key = own_key.to(keys.dtype.element_ty)
        own_value = tl.load(at + (G * M + G + group) * D + d, mask=d < D, other=0.0).to(values.dtype.element_ty)
        is_writer = (d < D) & (head == group * M)
        tl.store(key_at + position * D + d, own_key, mask=is_writer)
        tl.store(value_at + position * D + d, own_value, mask=is_writer)
        highest, total = tl.sum(query * own_key.to(tl.float32)), 1.0
        result = own_value.to(tl.float32)
    for now in range(block, tl.cdiv(limit, KEYS)):
        is_cached = now * KEYS + tl.arange(0, KEYS) < limit
        scores = tl.where(is_cached, tl.sum(key_block.to(tl.float32) * query, 1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        shares, shrink = tl.exp2(scores - higher), tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 0)
        result = result * shrink + tl.sum(shares[:, None] * value_block.to(tl.float32), 0)[None, :]
        highest = higher
        key_block, value_block = load_cached(key_at, value_at, now + 1, limit, d, D, KEYS)
    at = split_values + ((token * G * M + head) * SPLITS + split) * D
    tl.store(at + d, (result / total).to(split_values.dtype.element_ty), mask=d < D)
    at = split_bounds + (2 * (token * G + group) * M + head % M) * SPLITS + split
    tl.store(at, highest)
    tl.store(at + M * SPLITS, total)


@triton.jit
def load_shares(bounds_at, active, sinks_at, M: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr):
    """What each split's mean of values counts in its head's, (heads, splits): the softmaxes joined, with the sinks."""
    head, split = tl.arange(0, HEADS), tl.arange(0, SPLITS)
    mask = (head[:, None] < M) & (split[None, :] < active)
    at = bounds_at + head[:, None] * SPLITS + split[None, :]
    maxima = tl.load(at, mask=mask, other=float("-inf"))
    sums = tl.load(at + M * SPLITS, mask=mask, other=0.0)
    highest = tl.max(maxima, 1)
    if sinks_at is not None:
        sink = tl.load(sinks_at + head, mask=head < M, other=0.0).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    sums *= tl.where(mask, tl.exp2(maxima - highest[:, None]), 0.0)
    total = tl.sum(sums, 1)
    if sinks_at is not None:
        total += tl.exp2(sink - highest)
    return tl.where(mask, sums / total[:, None], 0.0)


@triton.jit
def project_splits(
    split_values, split_bounds, slots, positions, sinks, weight, parts, H, G,
    M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some rows of what the heads of one key head add to a token.

    Slots and positions are older than the step.
    """
    let_next_kernel_begin(PDL)
    group, token = tl.program_id(1), tl.program_id(2)
    head, d = tl.arange(0, HEADS)[:, None, None], tl.arange(0, COLUMNS)[None, None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)[None, :, None]
    tile = tl.load(
        weight + row[None, :, None] * (G * M * D) + (group * M + head) * D + d,
        mask=(head < M) & (row < H)[None, :, None] & (d < D), other=0.0,
    )  # fmt: skip
    slot = tl.load(slots + token).to(tl.int64)
    active = split_size(tl.load(positions + tl.maximum(slot, 0)).to(tl.int32), KEYS, SPLITS)[1]
    active = tl.where(slot < 0, 0, active)
    wait_for_earlier_kernels(PDL)
    at = token * G + group
    sinks_at = None if sinks is None else sinks + group * M
    values = tl.load(
        split_values + ((at * M + head) * SPLITS + split) * D + d,
        mask=(head < M) & (split < active) & (d < D), other=0.0,
    )  # fmt: skip
    shares = load_shares(split_bounds + at * 2 * M * SPLITS, active, sinks_at, M, HEADS, SPLITS)
    products = tl.dot(tile, tl.permute(values, (0, 2, 1)), input_precision="ieee")
    result = tl.sum(tl.sum(products * shares[:, None, :], 2), 0)
    tl.store(parts + at * H + row, result, mask=row < H)


def takes(sharing: int, head_dim: int) -> bool:
    """Whether a program of the output projection has room for all query heads of a key head."""
    return triton.next_power_of_2(sharing) * triton.next_power_of_2(head_dim) <= MOST_COLUMNS


def attention(
    qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, slots_T: Tensor, position_S: Tensor,
    frequencies: Tensor, factor: float, q_norm_D: Tensor | None, k_norm_D: Tensor | None, sinks_N: Tensor | None,
    eps: float, o_proj_HX: Tensor,
) -> Tensor:  # fmt: skip
    """The parts (T, G, H), float32, of heads that `takes` accepts."""
    tokens, all_heads, head_dim = qkv_TXD.shape
    (groups, length), hidden = keys_SGCD.shape[1:3], len(o_proj_HX)
    heads = all_heads - 2 * groups
    sharing, columns = heads // groups, max(triton.next_power_of_2(head_dim), 16)
    splits = min(max(PROGRAMS // (tokens * heads), 1), triton.cdiv(length, KEYS), MAX_SPLITS)
    splits = max(triton.next_power_of_2(splits), 16)  # a matrix product takes no fewer
    split_values = qkv_TXD.new_empty(tokens, heads, splits, head_dim)
    split_bounds = qkv_TXD.new_empty(tokens, groups, 2, sharing, splits, dtype=torch.float32)
    launch(
        attend_split, (splits, heads, tokens),
        qkv_TXD, keys_SGCD, values_SGCD, slots_T, position_S, frequencies, q_norm_D, k_norm_D, split_values,
        split_bounds, factor, eps, length, groups, sharing, head_dim, columns, KEYS, splits,
        device=qkv_TXD.device, rows=tokens, warps=1,
    )  # fmt: skip
    parts_TGH = torch.empty(tokens, groups, hidden, dtype=torch.float32, device=qkv_TXD.device)
    launch(
        project_splits, (triton.cdiv(hidden, ROWS), groups, tokens),
        split_values, split_bounds, slots_T, position_S, sinks_N, o_proj_HX, parts_TGH, hidden, groups, sharing,
        head_dim, ROWS, triton.next_power_of_2(sharing), columns, KEYS, splits,
        device=qkv_TXD.device, rows=tokens, warps=WARPS,
    )  # fmt: skip
    return parts_TGH
