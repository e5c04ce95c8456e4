"""The residual sum, its norm and the choice of experts in one kernel, a token a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels
from p828.kernels.decode.residual_triton import load_total, normalise

ELEMENTS = 16384  # of the router's weight, that a program holds at a time
WARPS = 4


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
def store_choice(
    experts_at, weights_at, scores, left, expert, scaling, E,
    K: tl.constexpr, SHARED: tl.constexpr, NORMALISED: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """The K best of `left`, best first, with their scores as weights, and behind them the shared experts."""
    choice = tl.arange(0, CHOICES)
    chosen = tl.where(choice < K, 0, E + choice - K).to(tl.int32)
    weights = tl.zeros((CHOICES,), tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(left, 0).to(tl.int32)
        chosen = tl.where(choice == k, best, chosen)
        weights = tl.where(choice == k, tl.sum(tl.where(expert == best, scores, 0.0), 0), weights)
        left = tl.where(expert == best, float("-inf"), left)
    if NORMALISED:
        # The floor keeps a token whose chosen scores all underflow to zero from dividing by zero.
        weights = weights / tl.maximum(tl.sum(weights, 0), 1e-20)
    weights = tl.where(choice < K, weights * scaling, 1.0)
    tl.store(experts_at + choice, chosen, mask=choice < K + SHARED)
    tl.store(weights_at + choice, weights, mask=choice < K + SHARED)


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
    value = load_total(x, parts, token, H, column, J)
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
    scores, left = score(tl.where(expert < E, logits, float("-inf")), correction, expert, E, SOFTMAX)
    if GROUPS > 1:
        left = limit_groups(left, expert, E, GROUPS, KEPT, GROUP_COLUMNS)
    store_choice(
        experts + token * (K + SHARED), weights + token * (K + SHARED), scores, left, expert, scaling, E,
        K, SHARED, NORMALISED, CHOICES,
    )  # fmt: skip


def route(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, router_weight_EH: Tensor,
    bias_E: Tensor, per_token: int, shared: int, scoring_func: str, n_group: int, topk_group: int,
    norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, hidden), experts = x_TH.shape, len(router_weight_EH)
    total_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    experts_TJ = torch.empty(tokens, per_token + shared, dtype=torch.int32, device=x_TH.device)
    weights_TJ = torch.empty(tokens, per_token + shared, dtype=torch.float32, device=x_TH.device)
    columns, padded = triton.next_power_of_2(hidden), max(triton.next_power_of_2(experts), 2)
    rows = min(max(ELEMENTS // columns, 1), padded)
    launch(
        route_token, (tokens,),
        x_TH, parts_TJH, norm_weight_H, router_weight_EH, bias_E, total_TH, normed_TH, experts_TJ, weights_TJ,
        eps, routed_scaling_factor, hidden, experts, 0 if parts_TJH is None else parts_TJH.shape[1],
        per_token, shared, scoring_func == "softmax", norm_topk_prob, n_group, topk_group,
        max(triton.next_power_of_2(n_group), 2), max(triton.next_power_of_2(per_token + shared), 2),
        rows, triton.cdiv(experts, rows), padded, columns, device=x_TH.device, rows=tokens, warps=WARPS,
    )  # fmt: skip
    return total_TH, normed_TH, experts_TJ, weights_TJ
