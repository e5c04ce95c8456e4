"""The chosen experts of a few tokens: only their weights are read, each once if many tokens chose the same.

Pairs of a token and an expert are numbered token · J + choice. Up to `PAIR_TOKENS` tokens a program takes some rows in
registers, as in `linear_triton`: of one pair's gate and up matrices, or of the down matrices of all of a token's
experts. For more, `group_pairs` lists each expert's pairs, and a program multiplies a tile of them by some of their
expert's rows. Shared experts come behind the routed ones: ids E, E + 1, ….
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import (
    launch,
    let_next_kernel_begin,
    prefetch,
    rows_of_program,
    wait_for_earlier_kernels,
)

PAIR_TOKENS = 3  # up to which programs are of a pair, and of a token for the down matrices
PAIR_GATE_UP = {"elements": 4096, "warps": 2}  # weights that a program holds, gate and up together
DOWN_OF_ONE = {"rows": 2, "warps": 2}  # rows of each of a token's experts, that a program holds; of one token
DOWN_OF_SEVERAL = {"rows": 2, "warps": 4}
WARP_ELEMENTS = 8192  # of such rows; for more a program has more warps, and beyond `MOST_WARPS` fewer rows
MOST_WARPS = 16
GROUP_GATE_UP = {"rows": 64, "columns": 128, "warps": 4, "stages": 3}
GROUP_DOWN = {"rows": 64, "columns": 128, "warps": 4, "stages": 3}
GROUP_TOKENS = 32  # at most, of a program
GROUP_TOKENS_OF_MANY = 64  # for more than 64 tokens; with four matrices at a time they do not fit
GROUP_WARPS = 4


@triton.jit
def expert_weights(routed, shared, expert, E, size):
    """Where an expert's matrix of `size` numbers begins."""
    at = routed + expert.to(tl.int64) * size
    if shared is not None:  # noqa: SIM102 Triton would compile both sides of an `and`
        if expert >= E:
            at = shared + (expert - E).to(tl.int64) * size
    return at


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def load_rows(at, row, column, H, mask, ONCE: tl.constexpr):
    """Rows of weights. ONCE: no other program reads them, so what else the L2 cache holds may stay."""
    policy: tl.constexpr = "evict_first" if ONCE else ""
    return tl.load(at + row[:, None] * H + column[None, :], mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def gate_up_of_pair(
    x, experts, routed, shared, inner, H, WIDTH, E,
    J: tl.constexpr, K: tl.constexpr, OF_PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner = act(gate x, up x) for some rows of one pair."""
    # Shared experts first: their weights are loaded while the kernel in front still chooses the others.
    choice, token = (tl.program_id(1) + K) % J, tl.program_id(2)
    expert = E + choice - K
    if choice < K:
        wait_for_earlier_kernels(PDL)
        expert = tl.load(experts + token * J + choice)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < WIDTH) & (column[None, :] < H)
    P = 2 * WIDTH if OF_PRODUCT else WIDTH
    at = expert_weights(routed, shared, expert, E, 2 * P * H)
    gate_rows = load_rows(at, row, column, H, mask, ONCE)
    up_rows = load_rows(at, P + row, column, H, mask, ONCE)
    if OF_PRODUCT:
        second_gate_rows = load_rows(at, WIDTH + row, column, H, mask, ONCE)
        second_up_rows = load_rows(at, P + WIDTH + row, column, H, mask, ONCE)
    wait_for_earlier_kernels(PDL)
    let_next_kernel_begin(PDL)
    value = tl.load(x + token * H + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.sum(gate_rows.to(tl.float32) * value, 1), tl.sum(up_rows.to(tl.float32) * value, 1)
    if OF_PRODUCT:
        gate *= up
        up = tl.sum(second_gate_rows.to(tl.float32) * value, 1) * tl.sum(second_up_rows.to(tl.float32) * value, 1)
    at = inner + (token * J + choice) * WIDTH + row
    tl.store(at, (silu(gate) * up).to(inner.dtype.element_ty), mask=row < WIDTH)


@triton.jit
def down_of_token(
    inner, experts, weights, routed, shared, part, H, WIDTH, E,
    J: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """part = Σ weight · down inner over a token's experts, for some rows. The choice is older than the kernel in front.

    A program an expert would leave J parts, all of which every program of the next kernel has to read.
    """
    let_next_kernel_begin(PDL)
    token, choice = tl.program_id(1), tl.arange(0, CHOICES)
    is_chosen, pair = choice < J, token * J + choice
    expert = tl.load(experts + pair, mask=is_chosen, other=0)
    share = tl.load(weights + pair, mask=is_chosen, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    weight_at = routed + expert.to(tl.int64) * H * WIDTH  # as `expert_weights`, of several experts at once
    if shared is not None:
        weight_at = tl.where(expert < E, weight_at, shared + (expert - E).to(tl.int64) * H * WIDTH)
    policy: tl.constexpr = "evict_first" if ONCE else ""
    down_rows = tl.load(
        weight_at[:, None, None] + row * WIDTH + column,
        mask=is_chosen[:, None, None] & (row < H) & (column < WIDTH), other=0.0, eviction_policy=policy,
    )  # fmt: skip
    wait_for_earlier_kernels(PDL)
    value = tl.load(
        inner + pair[:, None, None] * WIDTH + column, mask=is_chosen[:, None, None] & (column < WIDTH), other=0.0
    )
    products = tl.sum(down_rows.to(tl.float32) * value.to(tl.float32), 2) * share[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(part + token * H + row, tl.sum(products, 0), mask=row < H)


@triton.jit
def group_pairs(experts, pairs, counts, R, PAIRS: tl.constexpr, PDL: tl.constexpr):
    """An expert a program: the numbers of its pairs in ascending order, and how many they are."""
    let_next_kernel_begin(PDL)
    wait_for_earlier_kernels(PDL)
    pair = tl.arange(0, PAIRS)
    expert = tl.program_id(0)
    is_its = (tl.load(experts + pair, mask=pair < R, other=-1) == expert).to(tl.int32)
    rank = tl.cumsum(is_its, 0) - 1
    tl.store(pairs + expert * R + rank, pair, mask=is_its == 1)
    tl.store(counts + expert, tl.sum(is_its, 0))


@triton.jit
def gate_up_of_group(
    x, pairs, counts, routed, shared, inner, H, WIDTH, E, R,
    J: tl.constexpr, OF_PRODUCT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """inner = act(gate x, up x) for some rows of one expert and a tile of its pairs."""
    wait_for_earlier_kernels(PDL)
    let_next_kernel_begin(PDL)
    tile, expert = tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + expert)
    if tile * TOKENS >= count:
        return
    place = tile * TOKENS + tl.arange(0, TOKENS)
    pair = tl.load(pairs + expert * R + place, mask=place < count, other=0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    P = 2 * WIDTH if OF_PRODUCT else WIDTH
    weight_at = expert_weights(routed, shared, expert, E, 2 * P * H)
    x_at = x + (pair // J)[None, :] * H
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    second_gate, second_up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, H, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row[:, None] < WIDTH) & (column[None, :] < H)
        value = tl.load(x_at + column[:, None], mask=(place[None, :] < count) & (column[:, None] < H), other=0.0)
        gate = tl.dot(load_rows(weight_at, row, column, H, mask, False), value, gate, input_precision="ieee")
        up = tl.dot(load_rows(weight_at, P + row, column, H, mask, False), value, up, input_precision="ieee")
        if OF_PRODUCT:
            block = load_rows(weight_at, WIDTH + row, column, H, mask, False)
            second_gate = tl.dot(block, value, second_gate, input_precision="ieee")
            block = load_rows(weight_at, P + WIDTH + row, column, H, mask, False)
            second_up = tl.dot(block, value, second_up, input_precision="ieee")
    if OF_PRODUCT:
        gate *= up
        up = second_gate * second_up
    at = inner + pair[None, :] * WIDTH + row[:, None]
    mask = (place[None, :] < count) & (row[:, None] < WIDTH)
    tl.store(at, (silu(gate) * up).to(inner.dtype.element_ty), mask=mask)


@triton.jit
def down_of_group(
    inner, pairs, counts, weights, routed, shared, parts, H, WIDTH, E, R,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts = weight · down inner for some rows of one expert and a tile of its pairs.

    Lists and weights are older than the kernel in front.
    """
    let_next_kernel_begin(PDL)
    tile, expert = tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + expert)
    if tile * TOKENS >= count:
        return
    place = tile * TOKENS + tl.arange(0, TOKENS)
    pair = tl.load(pairs + expert * R + place, mask=place < count, other=0)
    share = tl.load(weights + pair, mask=place < count, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight_at = expert_weights(routed, shared, expert, E, H * WIDTH)
    first_row = tl.program_id(0) * ROWS
    size = tl.minimum(H - first_row, ROWS) * WIDTH * (routed.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(weight_at + first_row * WIDTH, size, 0, 1, PDL)
    wait_for_earlier_kernels(PDL)
    inner_at = inner + pair[None, :] * WIDTH
    product = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row[:, None] < H) & (column[None, :] < WIDTH)
        value = tl.load(
            inner_at + column[:, None], mask=(place[None, :] < count) & (column[:, None] < WIDTH), other=0.0
        )
        product = tl.dot(load_rows(weight_at, row, column, WIDTH, mask, False), value, product, input_precision="ieee")
    at = parts + pair[None, :] * H + row[:, None]
    mask = (place[None, :] < count) & (row[:, None] < H)
    tl.store(at, (product * share[None, :]).to(parts.dtype.element_ty), mask=mask)


def experts(
    x_TH: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, gate_up_EXH: Tensor, down_EHI: Tensor,
    shared_gate_up_SXH: Tensor | None, shared_down_SHI: Tensor | None, hidden_act: str,
) -> Tensor:  # fmt: skip
    """The parts (T, J or 1, H), float32."""
    inner_TJI = torch.empty(*experts_TJ.shape, down_EHI.shape[2], dtype=x_TH.dtype, device=x_TH.device)
    of_product = hidden_act == "swiglu_of_product"
    if len(x_TH) <= PAIR_TOKENS:
        _gate_up_of_pairs(x_TH, experts_TJ, gate_up_EXH, shared_gate_up_SXH, inner_TJI, of_product)
        return _down_of_tokens(inner_TJI, experts_TJ, weights_TJ, down_EHI, shared_down_SHI)
    total_experts = len(down_EHI) + (0 if shared_down_SHI is None else len(shared_down_SHI))
    groups = _group_pairs(experts_TJ, total_experts)
    parts_TJH = torch.empty(*experts_TJ.shape, x_TH.shape[1], dtype=torch.float32, device=x_TH.device)
    _gate_up_of_groups(x_TH, *groups, gate_up_EXH, shared_gate_up_SXH, inner_TJI, of_product)
    _down_of_groups(inner_TJI, *groups, weights_TJ, down_EHI, shared_down_SHI, parts_TJH)
    return parts_TJH


def _gate_up_of_pairs(
    x_TH: Tensor, experts_TJ: Tensor, routed_EXH: Tensor, shared_SXH: Tensor | None, inner_TJI: Tensor, of_product: bool
) -> None:
    (tokens, hidden), (_, choices, width) = x_TH.shape, inner_TJI.shape
    columns = triton.next_power_of_2(hidden)
    matrices = 4 if of_product else 2  # that a row is read of
    rows = rows_of_program(PAIR_GATE_UP["elements"] // matrices, columns, width, choices * tokens)
    routed_choices = choices - (0 if shared_SXH is None else len(shared_SXH))
    launch(
        gate_up_of_pair, (triton.cdiv(width, rows), choices, tokens),
        x_TH, experts_TJ, routed_EXH, shared_SXH, inner_TJI, hidden, width, len(routed_EXH), choices, routed_choices,
        of_product, rows, columns, tokens == 1, device=x_TH.device, rows=tokens, warps=PAIR_GATE_UP["warps"],
    )  # fmt: skip


def _down_of_tokens(
    inner_TJI: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, routed_EHI: Tensor, shared_SHI: Tensor | None
) -> Tensor:
    """The sums of all choices: (T, 1, H), float32."""
    (tokens, choices, width), hidden = inner_TJI.shape, routed_EHI.shape[1]
    part_T1H = torch.empty(tokens, 1, hidden, dtype=torch.float32, device=inner_TJI.device)
    columns, padded = triton.next_power_of_2(width), triton.next_power_of_2(choices)
    tile = DOWN_OF_ONE if tokens == 1 else DOWN_OF_SEVERAL
    row = padded * columns
    rows = rows_of_program(min(tile["rows"] * row, MOST_WARPS * WARP_ELEMENTS), row, hidden, tokens)
    warps = max(tile["warps"], triton.cdiv(rows * row, WARP_ELEMENTS))
    launch(
        down_of_token, (triton.cdiv(hidden, rows), tokens),
        inner_TJI, experts_TJ, weights_TJ, routed_EHI, shared_SHI, part_T1H, hidden, width, len(routed_EHI), choices,
        padded, rows, columns, tokens == 1, device=inner_TJI.device, rows=tokens, warps=min(warps, MOST_WARPS),
    )  # fmt: skip
    return part_T1H


def _group_pairs(experts_TJ: Tensor, total_experts: int) -> tuple[Tensor, Tensor]:
    """For each expert, shared ones too: the numbers of its pairs (the rest of its row is not set), and their count."""
    count = experts_TJ.numel()
    pairs_ER = torch.empty(total_experts, count, dtype=torch.int32, device=experts_TJ.device)
    counts_E = torch.empty(total_experts, dtype=torch.int32, device=experts_TJ.device)
    launch(
        group_pairs, (total_experts,),
        experts_TJ, pairs_ER, counts_E, count, triton.next_power_of_2(count),
        device=experts_TJ.device, rows=len(experts_TJ), warps=GROUP_WARPS,
    )  # fmt: skip
    return pairs_ER, counts_E


def _gate_up_of_groups(
    x_TH: Tensor, pairs_ER: Tensor, counts_E: Tensor, routed_EXH: Tensor, shared_SXH: Tensor | None,
    inner_TJI: Tensor, of_product: bool,
) -> None:  # fmt: skip
    (tokens, hidden), (_, choices, width) = x_TH.shape, inner_TJI.shape
    rows, block = GROUP_GATE_UP["rows"], _token_block(tokens, matrices=4 if of_product else 2)
    launch(
        gate_up_of_group, (triton.cdiv(width, rows), triton.cdiv(tokens, block), len(counts_E)),
        x_TH, pairs_ER, counts_E, routed_EXH, shared_SXH, inner_TJI, hidden, width, len(routed_EXH), pairs_ER.shape[1],
        choices, of_product, block, rows, GROUP_GATE_UP["columns"],
        device=x_TH.device, rows=tokens, warps=GROUP_GATE_UP["warps"], stages=GROUP_GATE_UP["stages"],
    )  # fmt: skip


def _down_of_groups(
    inner_TJI: Tensor, pairs_ER: Tensor, counts_E: Tensor, weights_TJ: Tensor, routed_EHI: Tensor,
    shared_SHI: Tensor | None, parts_TJH: Tensor,
) -> None:  # fmt: skip
    (tokens, _, hidden), width = parts_TJH.shape, inner_TJI.shape[2]
    rows, block = GROUP_DOWN["rows"], _token_block(tokens, matrices=1)
    launch(
        down_of_group, (triton.cdiv(hidden, rows), triton.cdiv(tokens, block), len(counts_E)),
        inner_TJI, pairs_ER, counts_E, weights_TJ, routed_EHI, shared_SHI, parts_TJH, hidden, width, len(routed_EHI),
        pairs_ER.shape[1], block, rows, GROUP_DOWN["columns"],
        device=inner_TJI.device, rows=tokens, warps=GROUP_DOWN["warps"], stages=GROUP_DOWN["stages"],
    )  # fmt: skip


def _token_block(tokens: int, matrices: int) -> int:
    """Pairs of a program that multiplies them by rows of so many matrices."""
    most = GROUP_TOKENS_OF_MANY if tokens > 64 and matrices <= 2 else GROUP_TOKENS
    return min(max(triton.next_power_of_2(tokens), 16), most)
