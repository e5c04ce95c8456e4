"""The choice of experts on the GPU. Why our own: `torch.topk` on rows of a few experts is two launches that sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32


@triton.jit
def experts_choose(scores, chosen, T, E, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The K best of each row, best first; of equal scores the first."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, COLUMNS)
    mask = (token[:, None] < T) & (expert[None, :] < E)
    left = tl.load(scores + token[:, None] * E + expert[None, :], mask=mask, other=float("-inf"))
    left = tl.where(left == left, left, float("-inf"))  # a NaN must not lead to an expert that is not there
    for k in tl.static_range(K):
        best = tl.argmax(left, 1)
        tl.store(chosen + token * K + k, best.to(tl.int64), mask=token < T)
        left = tl.where(expert[None, :] == best[:, None], float("-inf"), left)


def choose(scores_TE: Tensor, per_token: int) -> Tensor:
    tokens, experts = scores_TE.shape
    chosen_TK = torch.empty(tokens, per_token, dtype=torch.int64, device=scores_TE.device)
    columns = max(triton.next_power_of_2(experts), 2)
    experts_choose[(triton.cdiv(tokens, ROWS),)](scores_TE, chosen_TK, tokens, experts, per_token, ROWS, columns)
    return chosen_TK
