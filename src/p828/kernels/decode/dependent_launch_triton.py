"""Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch"; devices from Hopper on).

A kernel that is launched so begins when every program of the one in front has called `let_next_kernel_begin` or ended.
In a step of many rows, kernels that fill the device do not call it, and the next one's launch is what goes on beside
their end.
What the kernels of this folder keep to:

- Before `wait_for_earlier_kernels` a program writes nothing, and reads only what no kernel of the step writes (weights,
  the cache of earlier tokens), with the exceptions below. After it, all earlier kernels have ended: it waits for the
  one in front, of which a program has waited for those before. A program with no work may leave without waiting.
- Most kernels let the next one begin at once. So memory is read while the kernels in front wait for each other: the
  weights of several operations lie in registers or in the cache before it is their turn.
- The products with the down matrices read the choice of experts before the wait. It is complete: the products with the
  gate and up matrices, in between, let the next kernel begin only after their own wait.
- Slots and positions are older than the step: only its last kernel writes positions. So a step's first kernel begins
  when the last one of the step in front has ended, also where a graph has both.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from p828.kernels.cuda_driver import prefer_shared_memory

ALLOWED = True
MOST_ROWS = 32  # with more a kernel that fills the processors is slower for sharing them with the next one
SHARE_ROWS = 3  # up to which kernels ask for SHARED_PERCENT; with more, the experts' tiles need more shared memory
NOT, AT_THE_END, EARLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # `PDL` of a kernel
PROCESSORS = 132  # of an H100
SHARED_PERCENT = 25  # of a processor's fast memory, for kernels of few rows


@triton.jit
def wait_for_earlier_kernels(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_kernel_begin(PDL: tl.constexpr):
    if PDL == EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(at, size, part, parts, PDL: tl.constexpr):
    """Has the L2 cache read a part of `size` bytes of weights; only where kernels may begin early."""
    if PDL == EARLY:  # noqa: SIM102 Triton would compile both sides of an `and`
        if at is not None:
            address = at.to(tl.int64) & -16  # the instruction asks for that alignment
            for first in range(part * 131072, size, parts * 131072):
                offset = first + tl.arange(0, 128) * 1024
                tl.inline_asm_elementwise(
                    "{ .reg .pred inside; setp.ne.s32 inside, $2, 0;"
                    " @inside cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0; }",
                    "=r,l,r", [address + offset, (offset + 1024 <= size).to(tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any,
    device: torch.device, rows: int, warps: int, stages: int = 1, is_first: bool = False,
) -> None:  # fmt: skip
    """Start a kernel of a step of some rows; `PDL` is the kernels' own argument. `is_first`: of the step."""
    if device.type != "cuda":
        kernel[grid](*arguments, PDL=NOT.value)
        return
    is_dependent = ALLOWED and torch.cuda.get_device_capability(device) >= (9, 0)
    begins = EARLY if rows <= MOST_ROWS or math.prod(grid) < PROCESSORS else AT_THE_END
    compiled = kernel[grid](
        *arguments, PDL=begins.value if is_dependent else NOT.value, launch_pdl=is_dependent and not is_first,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if is_dependent and rows <= SHARE_ROWS:
        # With another share than the kernel in front it could not begin before that one has ended.
        prefer_shared_memory(compiled.function, SHARED_PERCENT)


def rows_of_program(elements: int, columns: int, rows: int, others: int = 1) -> int:
    """Rows of a matrix that a program holds: `elements` numbers, fewer where that leaves processors idle.

    `columns` and the result are powers of 2; `others` programs take the same rows.
    """
    fitting = max(elements // columns, 1)
    while fitting > 1 and triton.cdiv(rows, fitting) * others < PROCESSORS:
        fitting //= 2
    return fitting
