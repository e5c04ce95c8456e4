"""Products of a few rows with a matrix of weights, which is read once: the time is that of reading it.

Up to `VECTOR_TOKENS` rows: a program holds whole rows of the matrix in registers, loaded before it waits for the
kernel in front, and multiplies and adds on the plain cores; the residual sum and the norm are computed by every program
for itself. More rows: `tl.dot` over blocks of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import (
    PROCESSORS,
    launch,
    let_next_kernel_begin,
    prefetch,
    rows_of_program,
    wait_for_earlier_kernels,
)
from p828.kernels.decode.residual_triton import add_norm, load_total, normalise

VECTOR_TOKENS = 2
VECTOR = {"elements": 4096, "warps": 4}  # weights that a program holds
VECTOR_OF_MANY = {"elements": 8192, "warps": 8}  # of a matrix that would keep all processors busy several times
MANY_ELEMENTS = 16 * 2**20
NARROW = {"rows": 16, "columns": 256, "warps": 4, "stages": 3}  # a matrix of few rows, so that all processors have some
WIDE = {"rows": 32, "columns": 256, "warps": 4, "stages": 3}
WIDE_OF_MANY = {"rows": 64, "columns": 64, "warps": 4, "stages": 5}  # for more than `FEW_TOKENS`
FEW_TOKENS = 16
MATRIX_TOKENS = 64  # at most, of a program


@triton.jit
def linear_vector(
    x, parts, norm_weight, weight, out, total, eps, T, H, V,
    J: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_begin(PDL)
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (first + row[:, None] < V) & (column[None, :] < H)
    tile_at = weight + first.to(tl.int64) * H + row[:, None] * H + column[None, :]
    tile = tl.load(tile_at, mask=mask, other=0.0, eviction_policy="evict_first")  # nobody reads it again in this step
    if norm_weight is not None:
        gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    wait_for_earlier_kernels(PDL)
    for token in range(T):
        value = load_total(x, parts, token, H, column, J)
        if norm_weight is not None:
            if (J > 0) & (first == 0):
                tl.store(total + token * H + column, value.to(total.dtype.element_ty), mask=column < H)
            value = normalise(value, gain, eps, H, x.dtype.element_ty)
        product = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        at = out + token * V + first + row
        tl.store(at, product.to(out.dtype.element_ty), mask=first + row < V)


@triton.jit
def linear_matrix(
    x, weight, out, T, H, V, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first_row = tl.program_id(0) * ROWS
    size = tl.minimum(V - first_row, ROWS) * H * (weight.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(weight + first_row.to(tl.int64) * H, size, 0, 1, PDL)
    wait_for_earlier_kernels(PDL)
    product = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, H, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row[:, None] < V) & (column[None, :] < H)
        tile = tl.load(weight + row[:, None].to(tl.int64) * H + column[None, :], mask=mask, other=0.0)
        mask = (token[None, :] < T) & (column[:, None] < H)
        value = tl.load(x + token[None, :] * H + column[:, None], mask=mask, other=0.0)
        product = tl.dot(tile, value, product, input_precision="ieee")
    mask = (row[:, None] < V) & (token[None, :] < T)
    at = out + token[None, :] * V + row[:, None]
    tl.store(at, product.to(out.dtype.element_ty), mask=mask)


def linear(x_TH: Tensor, weight_VH: Tensor, out_dtype: torch.dtype) -> Tensor:
    tokens, hidden = x_TH.shape
    if tokens <= VECTOR_TOKENS:
        return _vector(x_TH, None, None, 0.0, weight_VH, out_dtype)[0]
    width = len(weight_VH)
    out_TV = torch.empty(tokens, width, dtype=out_dtype, device=x_TH.device)
    block = min(max(triton.next_power_of_2(tokens), 16), MATRIX_TOKENS)
    tiles = WIDE if tokens <= FEW_TOKENS else WIDE_OF_MANY
    if triton.cdiv(width, tiles["rows"]) < PROCESSORS:
        tiles = NARROW
    launch(
        linear_matrix, (triton.cdiv(width, tiles["rows"]), triton.cdiv(tokens, block)),
        x_TH, weight_VH, out_TV, tokens, hidden, width, block, tiles["rows"], tiles["columns"],
        device=x_TH.device, rows=tokens, warps=tiles["warps"], stages=tiles["stages"],
    )  # fmt: skip
    return out_TV


def norm_linear(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, weight_VH: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if len(x_TH) <= VECTOR_TOKENS:
        return _vector(x_TH, parts_TJH, norm_weight_H, eps, weight_VH, out_dtype)
    total_TH, normed_TH = add_norm(x_TH, parts_TJH, norm_weight_H, eps)
    return linear(normed_TH, weight_VH, out_dtype), total_TH


def _vector(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor | None, eps: float, weight_VH: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (tokens, hidden), width = x_TH.shape, len(weight_VH)
    out_TV = torch.empty(tokens, width, dtype=out_dtype, device=x_TH.device)
    total_TH = x_TH if parts_TJH is None else torch.empty_like(x_TH)
    columns = triton.next_power_of_2(hidden)
    tile = VECTOR if width * columns < MANY_ELEMENTS else VECTOR_OF_MANY
    rows = rows_of_program(tile["elements"], columns, width)
    launch(
        linear_vector, (triton.cdiv(width, rows),),
        x_TH, parts_TJH, norm_weight_H, weight_VH, out_TV, total_TH, eps, tokens, hidden, width,
        0 if parts_TJH is None else parts_TJH.shape[1], rows, columns,
        device=x_TH.device, rows=tokens, warps=tile["warps"],
    )  # fmt: skip
    return out_TV, total_TH
