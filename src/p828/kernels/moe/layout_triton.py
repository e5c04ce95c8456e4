"""Align to blocks: the row of every routed token, sorted by expert and padded to blocks, found on the GPU by counting.

Why our own: a radix sort of the choices takes ten launches a layer. Counting takes three: how often each expert is
chosen in every block of entries, where each block's rows of each expert begin, and the row of each entry. No atomics:
within an expert the entries keep their order, so the same input always gives the same rows. The plain twin is
`p828.model.experts.sort_by_expert`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # entries that one program counts and places
PART = 128  # of them placed at once: a table of PART × experts has to fit the registers
BLOCKS = 64  # blocks whose counts are summed at once


@triton.jit
def experts_count(chosen, valid, counts, loads, R, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, e]: entries of the block that chose e; loads[block, e]: those of valid tokens."""
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + entry, mask=entry < R, other=0).to(tl.int32)
    is_valid = tl.load(valid + entry // K, mask=entry < R, other=0) != 0
    at = block * E + tl.arange(0, E)
    tl.store(counts + at, tl.histogram(expert, E, mask=entry < R))
    tl.store(loads + at, tl.histogram(expert, E, mask=is_valid))


@triton.jit
def experts_offset(
    counts, loads, starts, offsets, loads_out, tile_expert, blocks, tiles_limit, n_experts,
    TILE: tl.constexpr, E: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """starts[block, e]: the first row of the block's entries that chose e; and every expert's first row and tiles."""
    expert = tl.arange(0, E)
    total, total_valid = tl.zeros((E,), tl.int32), tl.zeros((E,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * E + expert[None, :]
        total += tl.sum(tl.load(counts + at, mask=block[:, None] < blocks, other=0), 0)
        total_valid += tl.sum(tl.load(loads + at, mask=block[:, None] < blocks, other=0), 0)
    padded = (total + TILE - 1) // TILE * TILE
    end = tl.cumsum(padded, 0)
    tl.store(offsets + expert + 1, end, mask=expert < n_experts)
    tl.store(offsets, 0)
    tl.store(loads_out + expert, total_valid.to(tl.int64), mask=expert < n_experts)
    for first in range(0, tiles_limit, BLOCKS):
        tile = first + tl.arange(0, BLOCKS)
        owner = tl.sum((end[None, :] <= tile[:, None] * TILE).to(tl.int32), 1)
        tl.store(tile_expert + tile, owner, mask=tile < tiles_limit)
    before = end - padded
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * E + expert[None, :]
        count = tl.load(counts + at, mask=block[:, None] < blocks, other=0)
        tl.store(starts + at, before[None, :] + tl.cumsum(count, 0) - count, mask=block[:, None] < blocks)
        before += tl.sum(count, 0)


@triton.jit
def experts_place(chosen, starts, destination, source, R, E: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """The row of each entry, and the entry of each row that has one."""
    block = tl.program_id(0)
    expert = tl.arange(0, E)
    start = tl.load(starts + block * E + expert)
    for part in range(0, BLOCK, PART):
        entry = block * BLOCK + part + tl.arange(0, PART)
        chose = tl.load(chosen + entry, mask=entry < R, other=-1)[:, None] == expert[None, :]
        rank = tl.cumsum(chose.to(tl.int32), 0) - 1
        row = tl.sum(tl.where(chose, rank + start[None, :], 0), 1)
        tl.store(destination + entry, row, mask=entry < R)
        tl.store(source + row, entry, mask=entry < R)
        start += tl.sum(chose.to(tl.int32), 0)


def align_to_blocks(
    experts_TK: Tensor, valid_token_T: Tensor, n_experts: int, rows: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """destination_TK, source_R, offsets_E1, tile_expert (all int32) and loads_E (int64): the fields of
    `TokenPermutation`.
    """
    device, entries, per_token = experts_TK.device, experts_TK.numel(), experts_TK.shape[1]
    blocks, padded_experts = triton.cdiv(entries, BLOCK), max(triton.next_power_of_2(n_experts), 2)
    counts, loads, starts = torch.empty(3, blocks, padded_experts, dtype=torch.int32, device=device)
    offsets_E1 = torch.empty(n_experts + 1, dtype=torch.int32, device=device)
    loads_E = torch.empty(n_experts, dtype=torch.int64, device=device)
    tile_expert = torch.empty(rows // tile, dtype=torch.int32, device=device)
    destination_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    source_R = torch.full((rows,), -1, dtype=torch.int32, device=device)
    experts_count[(blocks,)](experts_TK, valid_token_T, counts, loads, entries, per_token, padded_experts, BLOCK)
    experts_offset[(1,)](
        counts, loads, starts, offsets_E1, loads_E, tile_expert, blocks, rows // tile, n_experts,
        tile, padded_experts, BLOCKS,
    )  # fmt: skip
    experts_place[(blocks,)](experts_TK, starts, destination_TK, source_R, entries, padded_experts, BLOCK, PART)
    return destination_TK, source_R, offsets_E1, tile_expert, loads_E
