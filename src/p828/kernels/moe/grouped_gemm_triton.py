"""Grouped GEMM: matrix products of rows sorted by expert, each expert's rows with its own weights.

Why our own: `torch.nn.functional.grouped_mm` reaches 490 to 730 TFLOP/s on an H100 at the sizes of the presets, these
6% more in the mean (-3 to +14%). Every expert's rows fill whole tiles (`TokenPermutation`), so a tile belongs to one
expert, needs no mask along the rows, and the host never learns how many rows an expert has. A fixed number of programs
walk over all tiles, in groups of GROUP tiles of rows, so that an expert's weights stay in the L2 cache. GPUs that have
the tensor memory accelerator (compute capability 9 and up) load and store tiles through it, others through pointers.
The plain twin is `p828.kernels.moe.grouped_gemm_cpu.grouped_linear_loop`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from p828.kernels.moe.tiles import TILE

GROUP = 8


class Tiles(NamedTuple):
    """Sizes of one program's tile; `depth` is along the dimension that is summed over."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    has_tma: bool


@triton.jit
def load_tile(x, row, column, row_end, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_TMA: tl.constexpr):
    """A tile of a matrix with rows of `width`; through pointers, zeros from `row_end` and `width` on."""
    if HAS_TMA:
        tile = x.load([row, column])
    else:
        rows, columns = (row + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLUMNS))[None, :]
        mask = (rows < row_end) & (columns < width)
        tile = tl.load(x + rows.to(tl.int64) * width + columns, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(y, value, row, column, row_end, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_TMA: tl.constexpr):
    if HAS_TMA:
        y.store([row, column], value.to(y.dtype))
    else:
        rows, columns = (row + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLUMNS))[None, :]
        mask = (rows < row_end) & (columns < width)
        tl.store(y + rows.to(tl.int64) * width + columns, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def experts_linear(
    x, w, y, tile_expert, rows_used, N, K, W_IS_NK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, HAS_TMA: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ for weights (E·N, K), or x w for weights (E·K, N), with the weights of the tile's expert."""
    rows = tl.load(rows_used)
    tiles_m, tiles_n = rows // ROWS, tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=HAS_TMA):
        first = tile // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        m, n = first + within % size, within // size
        expert = tl.load(tile_expert + m)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(tl.cdiv(K, DEPTH)):
            left = load_tile(x, m * ROWS, k * DEPTH, rows, K, ROWS, DEPTH, HAS_TMA)
            if W_IS_NK:
                begin = expert * N
                right = load_tile(w, begin + n * COLUMNS, k * DEPTH, begin + N, K, COLUMNS, DEPTH, HAS_TMA).T
            else:
                begin = expert * K
                right = load_tile(w, begin + k * DEPTH, n * COLUMNS, begin + K, N, DEPTH, COLUMNS, HAS_TMA)
            total = tl.dot(left, right, total)
        store_tile(y, total, m * ROWS, n * COLUMNS, rows, N, ROWS, COLUMNS, HAS_TMA)


@triton.jit
def experts_weight_gradient(
    dy, x, dw, offsets, E, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HAS_TMA: tl.constexpr,
):  # fmt: skip
    """dw[e] = dyᵀ x over the rows of expert e; zeros for an expert without rows."""
    tiles_n, tiles_k = tl.cdiv(N, ROWS), tl.cdiv(K, COLUMNS)
    for tile in tl.range(tl.program_id(0), E * tiles_n * tiles_k, tl.num_programs(0)):
        expert = tile // (tiles_n * tiles_k)
        n, k = tile // tiles_k % tiles_n, tile % tiles_k
        end = tl.load(offsets + expert + 1)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for row in range(tl.load(offsets + expert), end, DEPTH):
            left = load_tile(dy, row, n * ROWS, end, N, DEPTH, ROWS, HAS_TMA)
            right = load_tile(x, row, k * COLUMNS, end, K, DEPTH, COLUMNS, HAS_TMA)
            total = tl.dot(left.T, right, total)
        if HAS_TMA:
            # Three dimensions, so that what lies past an expert's last row is cut off and not the next one's.
            dw.store([expert, n * ROWS, k * COLUMNS], total.to(dw.dtype)[None, :, :])
        else:
            begin = expert * N
            store_tile(dw, total, begin + n * ROWS, k * COLUMNS, begin + N, K, ROWS, COLUMNS, HAS_TMA)


def linear(x_RA: Tensor, weight_EBA: Tensor, tile_expert: Tensor, rows_used: Tensor) -> Tensor:
    """Rows times their expert's weight, transposed: (R, A) and (E, B, A) give (R, B)."""
    return _product(x_RA, weight_EBA, tile_expert, rows_used, weight_is_transposed=True)


def linear_backward(dy_RB: Tensor, weight_EBA: Tensor, tile_expert: Tensor, rows_used: Tensor) -> Tensor:
    """The gradient of `linear`'s x: (R, B) and (E, B, A) give (R, A)."""
    return _product(dy_RB, weight_EBA, tile_expert, rows_used, weight_is_transposed=False)


def weight_gradient(dy_RB: Tensor, x_RA: Tensor, offsets_E1: Tensor) -> Tensor:
    """The gradient of `linear`'s weight: (R, B) and (R, A) give (E, B, A)."""
    experts, out, width = len(offsets_E1) - 1, dy_RB.shape[1], x_RA.shape[1]
    dweight_EBA = x_RA.new_empty(experts, out, width)
    tiles = _tiles(x_RA.device)
    experts_weight_gradient[(_programs(x_RA.device),)](
        _argument(dy_RB, tiles, tiles.depth, tiles.rows),
        _argument(x_RA, tiles, tiles.depth, tiles.columns),
        _argument(dweight_EBA, tiles, 1, tiles.rows, tiles.columns),
        offsets_E1, experts, out, width, tiles.rows, tiles.columns, tiles.depth, tiles.has_tma,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dweight_EBA


def _product(
    x_RK: Tensor, weight_EXY: Tensor, tile_expert: Tensor, rows_used: Tensor, weight_is_transposed: bool
) -> Tensor:
    depth, columns = x_RK.shape[1], weight_EXY.shape[1 if weight_is_transposed else 2]
    y_RN = x_RK.new_empty(len(x_RK), columns)
    tiles = _tiles(x_RK.device)
    weight_block = (tiles.columns, tiles.depth) if weight_is_transposed else (tiles.depth, tiles.columns)
    experts_linear[(_programs(x_RK.device),)](
        _argument(x_RK, tiles, tiles.rows, tiles.depth),
        _argument(weight_EXY.flatten(0, 1), tiles, *weight_block),
        _argument(y_RN, tiles, tiles.rows, tiles.columns),
        tile_expert, rows_used, columns, depth, weight_is_transposed,
        tiles.rows, tiles.columns, tiles.depth, GROUP, tiles.has_tma,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y_RN


def _argument(x: Tensor, tiles: Tiles, *block: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, list(block)) if tiles.has_tma else x


def _tiles(device: torch.device) -> Tiles:
    """The largest tile that fits the shared memory: data-centre GPUs have 160 KiB and more, others 99. As rows come in
    whole TILEs, `depth` divides it."""
    major = generation(device)
    if major in (9, 10):
        return Tiles(rows=TILE, columns=256, depth=64, stages=3, warps=8, has_tma=True)
    return Tiles(rows=TILE, columns=128, depth=32, stages=4, warps=8, has_tma=major > 10)


def generation(device: torch.device) -> int:
    """The major number of the GPU's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
