"""The residual stream between two kernels: the sum of x and the parts that the kernel before left, and its norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels

WARPS = 4


@triton.jit
def load_total(x_at, parts, token, H, column, J: tl.constexpr):
    """A row of x + Σ_j parts[:, j] in float32, rounded to x's dtype: what later kernels read is what is normalised."""
    total = tl.load(x_at + column, mask=column < H, other=0.0).to(tl.float32)
    if J > 0:
        added = tl.load(parts + token * J * H + column, mask=column < H, other=0.0).to(tl.float32)
        for j in tl.static_range(1, J):
            added += tl.load(parts + (token * J + j) * H + column, mask=column < H, other=0.0)
        total += added
    return total.to(x_at.dtype.element_ty).to(tl.float32)


@triton.jit
def normalise(total, weight, eps, H, dtype: tl.constexpr):
    """RMSNorm of a row that is 0 past H columns; in float32, rounded to `dtype`."""
    return (total * tl.rsqrt(tl.sum(total * total) / H + eps) * weight).to(dtype).to(tl.float32)


@triton.jit
def add_norm_rows(
    x, parts, norm_weight, total, normed, eps, H, J: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    """A row a program."""
    let_next_kernel_begin(PDL)
    column = tl.arange(0, COLUMNS)
    weight = tl.load(norm_weight + column, mask=column < H, other=0.0)
    wait_for_earlier_kernels(PDL)
    token = tl.program_id(0)
    value = load_total(x + token * H, parts, token, H, column, J)
    at = token * H + column
    if J > 0:
        tl.store(total + at, value.to(total.dtype.element_ty), mask=column < H)
    value = normalise(value, weight, eps, H, x.dtype.element_ty)
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=column < H)


def add_norm(x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tokens, hidden = x_TH.shape
    normed_TH = torch.empty_like(x_TH)
    total_TH = x_TH if parts_TJH is None else torch.empty_like(x_TH)
    count = 0 if parts_TJH is None else parts_TJH.shape[1]
    launch(
        add_norm_rows, (tokens,),
        x_TH, parts_TJH, norm_weight_H, total_TH, normed_TH, eps, hidden, count,
        triton.next_power_of_2(hidden), device=x_TH.device, rows=tokens, warps=WARPS,
    )  # fmt: skip
    return total_TH, normed_TH
