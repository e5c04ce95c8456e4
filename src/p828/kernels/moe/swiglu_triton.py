"""The experts' SwiGLU and its gradient: one pass over memory each.

Why our own: compiled code would keep the activation for the gradient of the down projection. Here the pass that
computes the activation's gradient computes the activation again, multiplies by the router's weight, sums that weight's
gradient, and stops at the last row in use, which only the device knows.

The rows are tokens (shared experts), or routed tokens permuted by expert and padded to whole blocks
(`TokenPermutation`), each with a weight (routed experts). Padding rows have the weight 0; rows past the last expert's
are neither read nor written. Plain twin: `p828.model.experts.activate`.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 512  # of one program
BACKWARD_COLUMNS = 256  # at a time, as more arrays are at hand then


@triton.jit
def load_arguments(gate, up, at, mask, INNER: tl.constexpr, OF_PRODUCT: tl.constexpr):
    """The arguments (a, b) of silu(a)·b, or with `swiglu_of_product` of silu(a·c)·(b·d): a, b, c, d."""
    if OF_PRODUCT:
        a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(gate + at + INNER, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(up + at + INNER, mask=mask, other=0.0).to(tl.float32)
    else:
        a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        c, d = a, b
    return a, b, c, d


@triton.jit
def load_weight(weights, source, row, rows):
    """Each row's weight, its place among the weights, and whether there is one."""
    if weights is None:
        weight, entry, is_entry = 1.0, row, row < rows
    else:
        entry = tl.load(source + row)
        is_entry = entry >= 0
        weight = tl.load(weights + entry, mask=is_entry, other=0.0)
    return weight, entry, is_entry


@triton.jit
def experts_activate(
    gate, up, weights, source, rows_used, out, rows, stride,
    INNER: tl.constexpr, OF_PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = weight of row · SwiGLU(gate, up), whose rows are `stride` apart."""
    used = rows if rows_used is None else tl.load(rows_used)
    if tl.program_id(0) * ROWS < used:
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        mask = (column < INNER) & (row < rows)
        weight, _, _ = load_weight(weights, source, row, rows)
        a, b, c, d = load_arguments(gate, up, row * stride + column, mask, INNER, OF_PRODUCT)
        if OF_PRODUCT:
            a, b = a * c, b * d
        tl.store(out + row * INNER + column, (a * tl.sigmoid(a) * b * weight).to(out.dtype.element_ty), mask=mask)


@triton.jit
def experts_activate_backward(
    grad, gate, up, weights, source, rows_used, dgate, dup, dweights, rows, stride,
    INNER: tl.constexpr, OF_PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of gate, up and the rows' weights; `grad` becomes the activation's output, for the gradient of W2."""
    used = rows if rows_used is None else tl.load(rows_used)
    if tl.program_id(0) * ROWS < used:
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        weight, entry, is_entry = load_weight(weights, source, row, rows)
        dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, INNER, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            mask = (column < INNER) & (row < rows)
            at = row * stride + column
            a, b, c, d = load_arguments(gate, up, at, mask, INNER, OF_PRODUCT)
            upstream = tl.load(grad + row * INNER + column, mask=mask, other=0.0).to(tl.float32)
            x, y = a, b
            if OF_PRODUCT:
                x, y = a * c, b * d
            sigmoid = tl.sigmoid(x)
            silu = x * sigmoid
            dweight += upstream * silu * y
            upstream *= weight
            tl.store(grad + row * INNER + column, (silu * y * weight).to(grad.dtype.element_ty), mask=mask)
            dx, dy = upstream * y * (sigmoid + silu * (1 - sigmoid)), upstream * silu
            if OF_PRODUCT:
                tl.store(dgate + at, (dx * c).to(dgate.dtype.element_ty), mask=mask)
                tl.store(dgate + at + INNER, (dy * d).to(dgate.dtype.element_ty), mask=mask)
                tl.store(dup + at, (dx * a).to(dgate.dtype.element_ty), mask=mask)
                tl.store(dup + at + INNER, (dy * b).to(dgate.dtype.element_ty), mask=mask)
            else:
                tl.store(dgate + at, dx.to(dgate.dtype.element_ty), mask=mask)
                tl.store(dup + at, dy.to(dgate.dtype.element_ty), mask=mask)
        if weights is not None:
            tl.store(dweights + entry, tl.sum(dweight, 1, keep_dims=True), mask=is_entry)


def activate(
    gate_RP: Tensor,
    up_RP: Tensor,
    inner: int,
    weights_TK: Tensor | None = None,
    source_R: Tensor | None = None,
    rows_used: Tensor | None = None,
) -> Tensor:
    """The activation, times the rows' weights if there are any: (R, I); P is I for `swiglu`, 2 I for
    `swiglu_of_product`.

    Gate and up have the same strides; numbers of a row are contiguous. Rows past `rows_used` are left unwritten.
    """
    rows, projected = gate_RP.shape
    out_RI = gate_RP.new_empty(rows, inner)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(inner, COLUMNS))
    experts_activate[grid](
        gate_RP, up_RP, weights_TK, source_R, rows_used, out_RI, rows, gate_RP.stride(0),
        inner, projected == 2 * inner, ROWS, COLUMNS,
    )  # fmt: skip
    return out_RI


def activate_backward_(
    grad_RI: Tensor,
    gate_RP: Tensor,
    up_RP: Tensor,
    dgate_RP: Tensor,
    dup_RP: Tensor,
    weights_TK: Tensor | None = None,
    dweights_TK: Tensor | None = None,
    source_R: Tensor | None = None,
    rows_used: Tensor | None = None,
) -> None:
    """Write the gradients of gate and up, which have their strides, and of the weights (float32); overwrite grad_RI by
    the output of `activate`."""
    (rows, projected), inner = gate_RP.shape, grad_RI.shape[1]
    experts_activate_backward[(triton.cdiv(rows, ROWS),)](
        grad_RI, gate_RP, up_RP, weights_TK, source_R, rows_used, dgate_RP, dup_RP, dweights_TK,
        rows, gate_RP.stride(0), inner, projected == 2 * inner, ROWS, BACKWARD_COLUMNS,
    )  # fmt: skip
