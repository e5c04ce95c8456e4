"""`add_embedding_gradient_` on a GPU: sort the tokens; then one program per run of equal tokens sums its rows.

Why our own: PyTorch's makes a new table of gradients for every micro-batch, in bfloat16, mostly of zeros.
No atomics, so the sums always come in the same order: a token's places in order, ROWS of them at a time, since the
most frequent tokens of a batch have runs of many hundreds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
LARGEST_BLOCK = 512  # columns of a program


@triton.jit
def embedding_add_runs(
    dweight, sorted_tokens, places, dx, T, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program for every sorted token; those that do not begin a run have nothing to do."""
    start = tl.program_id(0)
    token = tl.load(sorted_tokens + start)
    if tl.load(sorted_tokens + start - 1, mask=start > 0, other=-1) != token:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        next_token = token
        while next_token == token:
            row = start + tl.arange(0, ROWS)
            is_in_run = tl.load(sorted_tokens + row, mask=row < T, other=-1) == token
            place = tl.load(places + row, mask=is_in_run, other=0).to(tl.int64)
            mask = is_in_run[:, None] & (column < H)[None, :]
            x = tl.load(dx + place[:, None] * H + column[None, :], mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32), axis=0)
            start += ROWS
            next_token = tl.load(sorted_tokens + start, mask=start < T, other=-1)
        at = dweight + token.to(tl.int64) * H + column
        tl.store(at, tl.load(at, mask=column < H, other=0.0) + total, mask=column < H)


def add_embedding_gradient_triton_(dweight_VH: Tensor, tokens_T: Tensor, dx_TH: Tensor) -> None:
    tokens, hidden = dx_TH.shape
    sorted_tokens, places = tokens_T.to(torch.int32).sort(stable=True)  # 32-bit keys take half as many passes
    columns = min(LARGEST_BLOCK, triton.next_power_of_2(hidden))
    embedding_add_runs[(tokens, triton.cdiv(hidden, columns))](
        dweight_VH, sorted_tokens, places, dx_TH, tokens, hidden, ROWS=ROWS, COLUMNS=columns, num_warps=4
    )
