"""Time what one more kernel in a chain costs at least, and one more phase of a kernel that never ends.

usage: python benchmarks/decode_phases.py

A phase's programs read a row of 1,024 numbers that those of the phase before have written, normalise it and write the
next one, as a decoding step's kernels do; with weights they multiply some megabytes of them, too. Phases are kernels in
a CUDA graph, launched plainly or dependently (`p828.kernels.decode.dependent_launch_triton`), or turns of one kernel
whose programs wait for a count in memory. Needs an NVIDIA GPU, from Hopper on.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import EARLY, NOT, let_next_kernel_begin, wait_for_earlier_kernels

PHASES, HIDDEN, REPLAYS, ROUNDS = 60, 1024, 4, 5


@triton.jit
def load_weights(weight, phase, program, programs, ROWS: tl.constexpr, H: tl.constexpr):
    row = (phase * programs + program) * ROWS + tl.arange(0, ROWS)
    return tl.load(weight + row[:, None] * H + tl.arange(0, H)[None, :], eviction_policy="evict_first")


@triton.jit
def one_phase(x, out, tile, program, programs, ROWS: tl.constexpr, H: tl.constexpr):
    column = tl.arange(0, H)
    value = tl.load(x + column, cache_modifier=".cg").to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / H + 1e-6)
    if tile is None:
        tl.store(out + column, value.to(tl.bfloat16), mask=column % programs == program)
    else:
        row = program * ROWS + tl.arange(0, ROWS)
        product = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        tl.store(out + row, product.to(tl.bfloat16), mask=row < H)


@triton.jit
def phase_kernel(x, out, weight, phase, ROWS: tl.constexpr, H: tl.constexpr, PDL: tl.constexpr):
    let_next_kernel_begin(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tile = None
    if weight is not None:
        tile = load_weights(weight, phase, program, programs, ROWS, H)
    wait_for_earlier_kernels(PDL)
    one_phase(x, out, tile, program, programs, ROWS, H)


@triton.jit
def count_of(at):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def endless_kernel(x, out, weight, counts, phases, ROWS: tl.constexpr, H: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    for phase in range(phases):
        tile = None
        if weight is not None:
            tile = load_weights(weight, phase, program, programs, ROWS, H)
        if phase > 0:
            while count_of(counts + phase - 1) < programs:
                pass
        one_phase(x, out, tile, program, programs, ROWS, H)
        tl.debug_barrier()  # the count is one thread's; it publishes what all of them have written
        tl.atomic_add(counts + phase, 1, sem="release")
        x, out = out, x


def microseconds(run: Callable[[], object]) -> float:
    """Of a phase, the least of some rounds."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(ROUNDS):
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / REPLAYS / PHASES)
    return min(found)


def show(programs: int, rows: int, warps: int, weight: Tensor | None) -> None:
    x, out = (torch.randn(HIDDEN, device="cuda").bfloat16() for _ in range(2))
    counts = torch.zeros(PHASES, dtype=torch.int32, device="cuda")

    def chain(is_dependent: bool) -> None:
        mode = EARLY.value if is_dependent else NOT.value
        for phase in range(PHASES):
            between = (x, out) if phase % 2 == 0 else (out, x)
            phase_kernel[programs,](
                *between, weight, phase, rows, HIDDEN, PDL=mode, launch_pdl=is_dependent, num_warps=warps
            )

    def endless() -> None:
        counts.zero_()
        endless_kernel[programs,](x, out, weight, counts, PHASES, rows, HIDDEN, num_warps=warps)

    numbers = [microseconds(lambda: chain(False)), microseconds(lambda: chain(True)), microseconds(endless)]
    weights = 0.0 if weight is None else 2e-6 * programs * rows * HIDDEN
    print(f"{programs} programs, {weights:.1f} MB: " + ", ".join(f"{number:.2f}" for number in numbers), flush=True)


def main() -> None:
    print("µs a phase: kernels launched plainly, dependently, one kernel", flush=True)
    for programs, rows, warps in ((48, 8, 4), (132, 8, 4), (132, 16, 8)):
        for with_weights in (False, True):
            weight = torch.randn(PHASES * programs * rows, HIDDEN, device="cuda").bfloat16() if with_weights else None
            show(programs, rows, warps, weight)


if __name__ == "__main__":
    main()
