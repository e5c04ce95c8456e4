"""The residual sum, its norm and the choice of experts in one kernel, a token a program.

Where such a program could not hold the router's weight at once and tokens are few, a program takes one expert of a
token: it sums and normalises the token for itself and leaves the expert's logit. The last one to arrive chooses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels
from p828.kernels.decode.residual_triton import load_total, normalise

ELEMENTS = 16384  # of the router's weight, that the program of a token holds at a time
WARPS = 4
SPLIT_TOKENS = 4  # up to which a program may take an expert; with more, what all of them repeat costs too much
SPLIT_COLUMNS = 1024  # of the expert's row, that a warp holds
LANES = 32  # of a warp


@triton.jit
def limit_groups(choice, expert, E, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_COLUMNS: tl.constexpr):
    """Minus infinity outside the KEPT groups whose two best experts sum highest."""
    size = E // GROUPS
    group = tl.arange(0, GROUP_COLUMNS)
    best = tl.full((GROUP_COLUMNS,), float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        inside = tl.where(expert // size == g, choice, float("-inf"))
        first = tl.argmax(inside, 0)
        two = tl.max(inside, 0) + tl.max(tl.where(expert == first, float("-inf"), inside), 0)
        best = tl.where(group == g, two, best)
    kept = expert < 0
    for _ in tl.static_range(KEPT):
        first = tl.argmax(best, 0)
        kept = kept | (expert // size == first)
        best = tl.where(group == first, float("-inf"), best)
    return tl.where(kept, choice, float("-inf"))


@triton.jit
def score(logits, correction, expert, E, SOFTMAX: tl.constexpr):
    """The experts' scores, and what they are chosen by."""
    if SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = tl.where(expert < E, scores + correction, float("-inf"))
    return scores, tl.where(choice == choice, choice, float("-inf"))  # a NaN must not lead to an expert of another id


@triton.jit
def first_of_best(order, expert, ONE_WARP: tl.constexpr):
    """The expert of the highest number, of equal ones the first."""
    if ONE_WARP:  # in which the most and the least of whole numbers are an instruction each
        return tl.min(tl.where(order == tl.max(order, 0), expert, 0x7FFFFFFF), 0)
    return tl.argmax(order, 0).to(tl.int32)


@triton.jit
def store_choice(
    experts_at, weights_at, scores, left, expert, scaling, E,
    K: tl.constexpr, SHARED: tl.constexpr, NORMALISED: tl.constexpr, CHOICES: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    """The K best of `left`, best first, with their scores as weights, and behind them the shared experts."""
    bits = left.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers that are ordered as the floats are
    choice = tl.arange(0, CHOICES)
    chosen = tl.where(choice < K, 0, E + choice - K).to(tl.int32)
    weights = tl.zeros((CHOICES,), tl.float32)
    for k in tl.static_range(K):
        best = first_of_best(order, expert, ONE_WARP)
        chosen = tl.where(choice == k, best, chosen)
        weights = tl.where(choice == k, tl.sum(tl.where(expert == best, scores, 0.0), 0), weights)
        order = tl.where(expert == best, -0x80000000, order)  # below minus infinity's
    if NORMALISED:
        # The floor keeps a token whose chosen scores all underflow to zero from dividing by zero.
        weights = weights / tl.maximum(tl.sum(weights, 0), 1e-20)
    weights = tl.where(choice < K, weights * scaling, 1.0)
    tl.store(experts_at + choice, chosen, mask=choice < K + SHARED)
    tl.store(weights_at + choice, weights, mask=choice < K + SHARED)


@triton.jit
def choose_experts(
    logits, correction, expert, experts, weights, token, scaling, E,
    K: tl.constexpr, SHARED: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISED: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, GROUP_COLUMNS: tl.constexpr, CHOICES: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    """Stores a token's experts and their weights. Past E, logits are minus infinity."""
    scores, left = score(logits, correction, expert, E, SOFTMAX)
    if GROUPS > 1:
        left = limit_groups(left, expert, E, GROUPS, KEPT, GROUP_COLUMNS)
    store_choice(
        experts + token * (K + SHARED), weights + token * (K + SHARED), scores, left, expert, scaling, E,
        K, SHARED, NORMALISED, CHOICES, ONE_WARP,
    )  # fmt: skip


@triton.jit
def route_token(
    x, parts, norm_weight, router_weight, bias, total, normed, experts, weights, eps, scaling, H, E,
    J: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_begin(PDL)
    row, column, expert = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, EXPERTS)
    inside = column[None, :] < H
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    correction = tl.load(bias + expert, mask=expert < E, other=0.0)
    at = router_weight + row[:, None] * H + column[None, :]
    tile = tl.load(at, mask=inside & (row[:, None] < E), other=0.0)
    wait_for_earlier_kernels(PDL)
    token = tl.program_id(0)
    value = load_total(x + token * H, parts, token, H, column, J)
    store_at = token * H + column
    tl.store(total + store_at, value.to(total.dtype.element_ty), mask=column < H)
    value = normalise(value, gain, eps, H, x.dtype.element_ty)
    tl.store(normed + store_at, value.to(normed.dtype.element_ty), mask=column < H)

    logits = tl.full((EXPERTS,), float("-inf"), tl.float32)
    for block in tl.static_range(BLOCKS):
        if block > 0:
            mask = inside & (block * ROWS + row[:, None] < E)
            tile = tl.load(at + block * ROWS * H, mask=mask, other=0.0)
        found = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        is_here = expert[None, :] == block * ROWS + row[:, None]
        logits = tl.where(expert // ROWS == block, tl.sum(tl.where(is_here, found[:, None], 0.0), 0), logits)
    choose_experts(
        tl.where(expert < E, logits, float("-inf")), correction, expert, experts, weights, token, scaling, E,
        K, SHARED, SOFTMAX, NORMALISED, GROUPS, KEPT, GROUP_COLUMNS, CHOICES, False,
    )  # fmt: skip


@triton.jit
def route_expert(
    x, parts, norm_weight, router_weight, bias, total, normed, logits, arrivals, experts, weights, eps, scaling, H, E,
    J: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ONE_WARP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logit of an expert for a token, and if it is the last one the choice among all."""
    let_next_kernel_begin(PDL)
    own, token = tl.program_id(0), tl.program_id(1)
    column, expert = tl.arange(0, COLUMNS), tl.arange(0, EXPERTS)
    row = tl.load(router_weight + own * H + column, mask=column < H, other=0.0)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    correction = tl.load(bias + expert, mask=expert < E, other=0.0)
    wait_for_earlier_kernels(PDL)
    value = load_total(x + token * H, parts, token, H, column, J)
    is_stored = (column < H) & (own == 0)
    tl.store(total + token * H + column, value.to(total.dtype.element_ty), mask=is_stored)
    value = normalise(value, gain, eps, H, x.dtype.element_ty)
    tl.store(normed + token * H + column, value.to(normed.dtype.element_ty), mask=is_stored)
    tl.store(logits + token * E + own, tl.sum(row.to(tl.float32) * value, 0))
    tl.debug_barrier()  # the count is one thread's; it publishes what all of them have written
    if tl.atomic_add(arrivals + token, 1, sem="acq_rel") == E - 1:
        tl.debug_barrier()
        at = logits + token * E + expert
        choose_experts(
            tl.load(at, mask=expert < E, other=float("-inf"), cache_modifier=".cg"),
            correction, expert, experts, weights, token, scaling, E,
            K, SHARED, SOFTMAX, NORMALISED, GROUPS, KEPT, GROUP_COLUMNS, CHOICES, ONE_WARP,
        )  # fmt: skip
        tl.store(arrivals + token, 0)


def is_split(tokens: int, hidden: int, experts: int) -> bool:
    """Whether a program takes one expert of a token."""
    elements = triton.next_power_of_2(experts) * triton.next_power_of_2(hidden)
    return tokens <= SPLIT_TOKENS and elements > ELEMENTS


def route(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, router_weight_EH: Tensor,
    bias_E: Tensor, per_token: int, shared: int, scoring_func: str, n_group: int, topk_group: int,
    norm_topk_prob: bool, routed_scaling_factor: float, arrivals_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, hidden), experts = x_TH.shape, len(router_weight_EH)
    total_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    experts_TJ = torch.empty(tokens, per_token + shared, dtype=torch.int32, device=x_TH.device)
    weights_TJ = torch.empty(tokens, per_token + shared, dtype=torch.float32, device=x_TH.device)
    columns, padded = triton.next_power_of_2(hidden), max(triton.next_power_of_2(experts), 2)
    inputs = x_TH, parts_TJH, norm_weight_H, router_weight_EH, bias_E, total_TH, normed_TH
    sizes = eps, routed_scaling_factor, hidden, experts, 0 if parts_TJH is None else parts_TJH.shape[1]
    choice = (
        per_token, shared, scoring_func == "softmax", norm_topk_prob, n_group, topk_group,
        max(triton.next_power_of_2(n_group), 2), max(triton.next_power_of_2(per_token + shared), 2),
    )  # fmt: skip
    if is_split(tokens, hidden, experts):
        logits_TE = torch.empty(tokens, experts, dtype=torch.float32, device=x_TH.device)
        warps = max(columns // SPLIT_COLUMNS, 1)
        launch(
            route_expert, (experts, tokens),
            *inputs, logits_TE, arrivals_T, experts_TJ, weights_TJ, *sizes, *choice,
            max(padded, LANES), columns, warps == 1, device=x_TH.device, rows=tokens, warps=warps,
        )  # fmt: skip
    else:
        rows = min(max(ELEMENTS // columns, 1), padded)
        launch(
            route_token, (tokens,),
            *inputs, experts_TJ, weights_TJ, *sizes, *choice, rows, triton.cdiv(experts, rows), padded, columns,
            device=x_TH.device, rows=tokens, warps=WARPS,
        )  # fmt: skip
    return total_TH, normed_TH, experts_TJ, weights_TJ
