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
from p828.kernels.decode.tokens_triton import embed

VECTOR_TOKENS = 2
VECTOR = {"elements": 4096, "warps": 4}  # weights that a program holds
LARGE = {"elements": 8192, "warps": 8}  # of a matrix that would keep all processors busy several times
LARGE_OF_TWO = {"elements": 16384, "warps": 8}  # the same for two tokens
LARGE_ELEMENTS = 16 * 2**20  # of such a matrix
NARROW = {"rows": 16, "columns": 256, "warps": 4, "stages": 3}  # a matrix of few rows, so that all processors have some
WIDE = {"rows": 32, "columns": 256, "warps": 4, "stages": 3}
WIDE_OF_MANY = {"rows": 64, "columns": 64, "warps": 4, "stages": 5}  # for more than `FEW_TOKENS`
FEW_TOKENS = 16
MATRIX_TOKENS = 64  # at most, of a program


@triton.jit
def linear_vector(
    x, parts, norm_weight, weight, out, total, slots, token_of_slot, position_of_slot, eps, T, H, V,
    J: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = norm(x + Σ parts) weightᵀ, and the sum itself as total.

    With `token_of_slot` x is the embedding, of which a token has the row of its slot's newest token. With
    `position_of_slot` the rows of weights are read in turns from the first and from the last one.
    """
    let_next_kernel_begin(PDL)
    block = tl.program_id(0)
    if position_of_slot is not None:
        is_turned = tl.load(position_of_slot + tl.load(slots)) % 2 == 1
        block = tl.where(is_turned, tl.num_programs(0) - 1 - block, block)
    first = block * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (first + row[:, None] < V) & (column[None, :] < H)
    tile_at = weight + first.to(tl.int64) * H + row[:, None] * H + column[None, :]
    # But for rows that the next step finds in the L2 cache, nobody reads them again soon.
    policy: tl.constexpr = "evict_first" if position_of_slot is None else ""
    tile = tl.load(tile_at, mask=mask, other=0.0, eviction_policy=policy)
    if norm_weight is not None:
        gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    wait_for_earlier_kernels(PDL)
    for token in range(T):
        source = token
        if token_of_slot is not None:
            source = tl.load(token_of_slot + tl.load(slots + token))
        value = load_total(x + source * H, parts, token, H, column, J)
        if norm_weight is not None:
            if total is not None:  # noqa: SIM102 Triton would compile both sides of an `and`
                if first == 0:
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


def embed_norm_linear(
    embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor, norm_weight_H: Tensor, eps: float, weight_XH: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = embedding_VH.dtype
    if len(slots_T) <= VECTOR_TOKENS:
        return _vector(embedding_VH, None, norm_weight_H, eps, weight_XH, dtype, slots_T, token_S=token_S)
    return norm_linear(embed(embedding_VH, slots_T, token_S), None, norm_weight_H, eps, weight_XH, dtype)


def logits(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, head_VH: Tensor, slots_T: Tensor,
    position_S: Tensor,
) -> Tensor:  # fmt: skip
    arguments = x_TH, parts_TJH, norm_weight_H, eps, head_VH, torch.float32
    if len(x_TH) == 1:
        return _vector(*arguments, slots_T, position_S=position_S)[0]
    return norm_linear(*arguments)[0]


def _vector(
    x: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor | None, eps: float, weight_VH: Tensor,
    out_dtype: torch.dtype, slots_T: Tensor | None = None, token_S: Tensor | None = None,
    position_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`x`: of each token (T, H), or with `token_S` the embedding (V, H)."""
    tokens, hidden, width = len(x) if slots_T is None else len(slots_T), x.shape[1], len(weight_VH)
    out_TV = torch.empty(tokens, width, dtype=out_dtype, device=x.device)
    is_new = parts_TJH is not None or token_S is not None
    total_TH = x.new_empty(tokens, hidden) if is_new else None
    columns = triton.next_power_of_2(hidden)
    large = LARGE if tokens == 1 else LARGE_OF_TWO
    tile = VECTOR if width * columns < LARGE_ELEMENTS else large
    rows = rows_of_program(tile["elements"], columns, width)
    launch(
        linear_vector, (triton.cdiv(width, rows),),
        x, parts_TJH, norm_weight_H, weight_VH, out_TV, total_TH, slots_T, token_S, position_S, eps, tokens, hidden,
        width, 0 if parts_TJH is None else parts_TJH.shape[1], rows, columns,
        device=x.device, rows=tokens, warps=tile["warps"], is_first=token_S is not None,
    )  # fmt: skip
    return out_TV, x if total_TH is None else total_TH
