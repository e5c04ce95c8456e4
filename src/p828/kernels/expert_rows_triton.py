"""Moving rows between tokens' order and experts' order, and the activation between an expert's products.

Rows are padded per expert to whole tiles (`Order`). Padding rows are read as zeros and written as zeros, so nothing
they meet needs a mask; rows past the last expert's are neither read nor written. Plain twins: `gather_rows`,
`combine_rows` and `activate` of `p828.model.experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 512  # of one program
BACKWARD_COLUMNS = 256  # at a time, as more arrays are at hand then


@triton.jit
def experts_gather(x, entry_of_row, rows_used, out, H, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[row] = x[token of row], zeros for padding."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < tl.load(rows_used):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        entry = tl.load(entry_of_row + row)[:, None]
        inside = column[None, :] < H
        token = (entry // K).to(tl.int64)
        value = tl.load(x + token * H + column[None, :], mask=inside & (entry >= 0), other=0.0)
        tl.store(out + row[:, None].to(tl.int64) * H + column[None, :], value, mask=inside)


@triton.jit
def experts_combine(y, row_of_entry, out, T, H, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[t] = Σ_k y[row of (t, k)], summed in float32 in the order of k."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token[:, None] < T) & (column[None, :] < H)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_entry + token * K + k, mask=token < T, other=0).to(tl.int64)
        total += tl.load(y + row[:, None] * H + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = token[:, None].to(tl.int64) * H + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_activation(gate_up, row, column, mask, INNER: tl.constexpr, OF_PRODUCT: tl.constexpr):
    """The activation's two arguments (a, b) of silu(a)·b, and what they are products of with `swiglu_of_product`."""
    WIDTH: tl.constexpr = 4 * INNER if OF_PRODUCT else 2 * INNER
    at = gate_up + row * WIDTH + column
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + INNER, mask=mask, other=0.0).to(tl.float32)
    c, d = a, b
    if OF_PRODUCT:
        c = tl.load(at + 2 * INNER, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(at + 3 * INNER, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def experts_activate(
    gate_up, weights, entry_of_row, rows_used, out,
    INNER: tl.constexpr, OF_PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = weight of row · SwiGLU(gate_up)."""
    if tl.program_id(0) * ROWS < tl.load(rows_used):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        mask = (column < INNER) & (row >= 0)
        entry = tl.load(entry_of_row + row)
        weight = tl.load(weights + entry, mask=entry >= 0, other=0.0)
        a, b, c, d = load_activation(gate_up, row, column, mask, INNER, OF_PRODUCT)
        if OF_PRODUCT:
            a, b = a * c, b * d
        tl.store(out + row * INNER + column, (a * tl.sigmoid(a) * b * weight).to(out.dtype.element_ty), mask=mask)


@triton.jit
def experts_activate_backward(
    grad, gate_up, weights, entry_of_row, rows_used, dgate_up, inner, dweights,
    INNER: tl.constexpr, OF_PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of gate_up and of the rows' weights; and the activation's output again, for the gradient of W2."""
    if tl.program_id(0) * ROWS < tl.load(rows_used):
        WIDTH: tl.constexpr = 4 * INNER if OF_PRODUCT else 2 * INNER
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        entry = tl.load(entry_of_row + row)
        weight = tl.load(weights + entry, mask=entry >= 0, other=0.0)
        dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, INNER, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            mask = (column < INNER) & (row >= 0)
            a, b, c, d = load_activation(gate_up, row, column, mask, INNER, OF_PRODUCT)
            at = dgate_up + row * WIDTH + column
            upstream = tl.load(grad + row * INNER + column, mask=mask, other=0.0).to(tl.float32)
            x, y = a, b
            if OF_PRODUCT:
                x, y = a * c, b * d
            sigmoid = tl.sigmoid(x)
            silu = x * sigmoid
            dweight += upstream * silu * y
            upstream *= weight
            tl.store(inner + row * INNER + column, (silu * y * weight).to(inner.dtype.element_ty), mask=mask)
            dx, dy = upstream * y * (sigmoid + silu * (1 - sigmoid)), upstream * silu
            if OF_PRODUCT:
                tl.store(at + 2 * INNER, (dx * a).to(dgate_up.dtype.element_ty), mask=mask)
                tl.store(at + 3 * INNER, (dy * b).to(dgate_up.dtype.element_ty), mask=mask)
                dx, dy = dx * c, dy * d
            tl.store(at, dx.to(dgate_up.dtype.element_ty), mask=mask)
            tl.store(at + INNER, dy.to(dgate_up.dtype.element_ty), mask=mask)
        tl.store(dweights + entry, tl.sum(dweight, 1, keep_dims=True), mask=entry >= 0)


def gather(x_TH: Tensor, entry_R: Tensor, rows_used: Tensor, per_token: int) -> Tensor:
    """(T, H) to (R, H)."""
    rows, width = len(entry_R), x_TH.shape[1]
    out_RH = x_TH.new_empty(rows, width)
    grid = (rows // ROWS, triton.cdiv(width, COLUMNS))
    experts_gather[grid](x_TH, entry_R, rows_used, out_RH, width, per_token, ROWS, COLUMNS)
    return out_RH


def combine(y_RH: Tensor, row_TK: Tensor) -> Tensor:
    """(R, H) to (T, H)."""
    (tokens, per_token), width = row_TK.shape, y_RH.shape[1]
    out_TH = y_RH.new_empty(tokens, width)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))
    experts_combine[grid](y_RH, row_TK, out_TH, tokens, width, per_token, ROWS, COLUMNS)
    return out_TH


def activate(gate_up_RP: Tensor, weights_TK: Tensor, entry_R: Tensor, rows_used: Tensor, inner: int) -> Tensor:
    """Weighted activation: (R, P) to (R, I); P is 2 I for `swiglu`, 4 I for `swiglu_of_product`."""
    rows, projected = gate_up_RP.shape
    out_RI = gate_up_RP.new_empty(rows, inner)
    grid = (rows // ROWS, triton.cdiv(inner, COLUMNS))
    experts_activate[grid](
        gate_up_RP, weights_TK, entry_R, rows_used, out_RI, inner, projected == 4 * inner, ROWS, COLUMNS
    )
    return out_RI


def activate_backward(
    grad_RI: Tensor, gate_up_RP: Tensor, weights_TK: Tensor, entry_R: Tensor, rows_used: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate_up_RP and weights_TK (float32), and the activation's output."""
    (rows, projected), inner = gate_up_RP.shape, grad_RI.shape[1]
    dgate_up_RP, inner_RI, dweights_TK = map(torch.empty_like, (gate_up_RP, grad_RI, weights_TK))
    experts_activate_backward[(rows // ROWS,)](
        grad_RI, gate_up_RP, weights_TK, entry_R, rows_used, dgate_up_RP, inner_RI, dweights_TK,
        inner, projected == 4 * inner, ROWS, BACKWARD_COLUMNS,
    )  # fmt: skip
    return dgate_up_RP, inner_RI, dweights_TK
