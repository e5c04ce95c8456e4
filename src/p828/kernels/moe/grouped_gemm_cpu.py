"""Grouped GEMM without a kernel of our own: one linear layer per expert over rows sorted by expert."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_RA: Tensor, weight_EBA: Tensor, loads_E: Tensor) -> Tensor:
    """Rows of expert e times weight e, transposed: (R, A) and (E, B, A) give (R, B).

    `x_RA` holds the rows of expert 0 first, then those of expert 1, …; `loads_E` (int64, sums to R) says how many each
    has, zero among them. There is a product for each expert, on any device in any dtype; the host waits for the loads.
    """
    return GroupedLinear.apply(x_RA, weight_EBA, loads_E.tolist())


def grouped_mm(x_RA: Tensor, weight_EBA: Tensor, loads_E: Tensor) -> Tensor:
    """`grouped_linear` in bfloat16 on CUDA, as PyTorch's one product for all experts: the host does not wait."""
    return F.grouped_mm(x_RA, weight_EBA.transpose(1, 2), offs=loads_E.cumsum(0).to(torch.int32))


class GroupedLinear(torch.autograd.Function):
    """A product for each expert, written in place into the rows or the weights' gradients of all."""

    @staticmethod
    def forward(ctx: Any, x_RA: Tensor, weight_EBA: Tensor, loads: list[int]) -> Tensor:
        ctx.save_for_backward(x_RA, weight_EBA)
        ctx.loads = loads
        y_RB = x_RA.new_empty(len(x_RA), weight_EBA.shape[1])
        for x, weight_BA, y in zip(x_RA.split(loads), weight_EBA, y_RB.split(loads), strict=True):
            torch.mm(x, weight_BA.T, out=y)
        return y_RB

    @staticmethod
    def backward(ctx: Any, dy_RB: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RA, weight_EBA = ctx.saved_tensors
        dx_RA, dweight_EBA = torch.empty_like(x_RA), torch.empty_like(weight_EBA)
        by_expert = (tensor.split(ctx.loads) for tensor in (x_RA, dy_RB, dx_RA))
        for x, dy, dx, weight_BA, dweight_BA in zip(*by_expert, weight_EBA, dweight_EBA, strict=True):
            torch.mm(dy, weight_BA, out=dx)
            torch.mm(dy.T, x, out=dweight_BA)
        return dx_RA, dweight_EBA, None


def grouped_linear_loop(x_RA: Tensor, weight_EBA: Tensor, loads_E: Tensor) -> Tensor:
    """The plain twin: a linear layer per expert, on any device in any dtype."""
    rows = x_RA.split(loads_E.tolist())
    # One unbind, not E selections: the backward of a selection fills a whole (E, B, A) tensor each time.
    return torch.cat([F.linear(x, weight) for x, weight in zip(rows, weight_EBA.unbind(), strict=True)])
