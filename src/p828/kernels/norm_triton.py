"""The kernels of `p828.kernels.norm`: rows of H numbers, a few rows a program, sums in float32.

Why our own: the sum and the norm behind it are one pass where PyTorch has two, and each program keeps its share of the
weight's gradient, where compiled code writes a tensor for it and sums that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # that one program holds of each tensor at a time


@triton.jit
def norm_forward(x, delta, weight, total, normed, eps, T, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < T) & (column < H)
    at = row.to(tl.int64) * H + column
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        # Rounded before it is normalised, so that the backward pass, which reads what was stored, sees the same number.
        stored = (value + tl.load(delta + at, mask=mask, other=0.0)).to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=mask)
        value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / H + eps)
    value *= scale * tl.load(weight + column, mask=column < H, other=0.0)
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    grad_total, grad_normed, total, weight, dx, dweights, eps, T, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx, and each program's share of the weight's gradient in a row of dweights."""
    column = tl.arange(0, COLUMNS)[None, :]
    gain = tl.load(weight + column, mask=column < H, other=0.0)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (column < H)
        at = row.to(tl.int64) * H + column
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / H + eps)
        value *= scale
        dweight += grad * value
        grad *= gain
        along = tl.sum(grad * value, 1, keep_dims=True) / H
        grad = scale * (grad - value * along)
        if grad_total is not None:
            grad += tl.load(grad_total + at, mask=mask, other=0.0)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweights + tl.program_id(0) * H + column, tl.sum(dweight, 0, keep_dims=True), mask=column < H)


def forward(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, or x itself without a delta, and its normalisation."""
    total_TH, normed_TH = x_TH if delta_TH is None else torch.empty_like(x_TH), torch.empty_like(x_TH)
    width = x_TH.shape[-1]
    tokens, rows, columns = x_TH.numel() // width, *_block(width)
    norm_forward[(triton.cdiv(tokens, rows),)](
        x_TH, delta_TH, weight_H, total_TH, normed_TH, eps, tokens, width, rows, columns
    )
    return total_TH, normed_TH


def backward(
    grad_total_TH: Tensor | None, grad_normed_TH: Tensor, total_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    width = total_TH.shape[-1]
    tokens, rows, columns = total_TH.numel() // width, *_block(width)
    programs = min(
        4 * torch.cuda.get_device_properties(total_TH.device).multi_processor_count, triton.cdiv(tokens, rows)
    )
    dx_TH = torch.empty_like(total_TH)
    dweights_XH = torch.empty(programs, width, dtype=torch.float32, device=total_TH.device)
    norm_backward[(programs,)](
        grad_total_TH, grad_normed_TH, total_TH, weight_H, dx_TH, dweights_XH, eps, tokens, width, rows, columns
    )
    return dx_TH, dweights_XH.sum(0)


def _block(width: int) -> tuple[int, int]:
    """Rows and columns of a block that holds whole rows."""
    columns = triton.next_power_of_2(width)
    return max(ELEMENTS // columns, 1), columns
