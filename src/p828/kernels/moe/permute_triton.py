"""Permute and unpermute: rows from tokens' order to experts' order, and back.

Rows are padded per expert to whole blocks (`TokenPermutation`). Padding rows are written as zeros, so that no later
kernel needs a mask; rows past the last expert's are neither read nor written. Plain twins: `permute` and `unpermute` of
`p828.model.experts`.

Why passes of their own: a product that gathers its own rows was faster with 48 small experts, by 1.6% of a step, and
slower with 8 large ones (benchmarks/RESULTS.md), and one that adds to tokens' rows would need atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 512  # of one program


@triton.jit
def experts_permute(x, source, rows_used, out, H, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[row] = x[token of row], zeros for padding."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < tl.load(rows_used):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        entry = tl.load(source + row)[:, None]
        inside = column[None, :] < H
        token = (entry // K).to(tl.int64)
        value = tl.load(x + token * H + column[None, :], mask=inside & (entry >= 0), other=0.0)
        tl.store(out + row[:, None].to(tl.int64) * H + column[None, :], value, mask=inside)


@triton.jit
def experts_unpermute(y, destination, out, T, H, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[t] = Σ_k y[row of (t, k)], summed in float32 in the order of k."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token[:, None] < T) & (column[None, :] < H)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(destination + token * K + k, mask=token < T, other=0).to(tl.int64)
        total += tl.load(y + row[:, None] * H + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = token[:, None].to(tl.int64) * H + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def permute(x_TH: Tensor, source_R: Tensor, rows_used: Tensor, per_token: int) -> Tensor:
    """(T, H) to (R, H): each token's row, once for every expert that it goes to."""
    rows, width = len(source_R), x_TH.shape[1]
    out_RH = x_TH.new_empty(rows, width)
    grid = (rows // ROWS, triton.cdiv(width, COLUMNS))
    experts_permute[grid](x_TH, source_R, rows_used, out_RH, width, per_token, ROWS, COLUMNS)
    return out_RH


def unpermute(y_RH: Tensor, destination_TK: Tensor) -> Tensor:
    """(R, H) to (T, H): the sum over a token's experts."""
    (tokens, per_token), width = destination_TK.shape, y_RH.shape[1]
    out_TH = y_RH.new_empty(tokens, width)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))
    experts_unpermute[grid](y_RH, destination_TK, out_TH, tokens, width, per_token, ROWS, COLUMNS)
    return out_TH
