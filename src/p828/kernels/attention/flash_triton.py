"""The kernels behind `p828.kernels.attention.ops`: causal flash attention over documents laid end to end.

Why our own: PyTorch's FlashAttention-2 uses neither Hopper's tensor memory accelerator nor its asynchronous products,
cuDNN knows no documents, neither knows sinks, and FlashAttention-2's backward adds its dq in no fixed order. Forward
and backward of 8 rows of 2,048 tokens, 16 heads of 64 over 4, take 1.20 ms with FlashAttention-2 on an H100, 0.80 with
cuDNN and 0.73 here; with documents of 300 tokens, FlashAttention-2 takes 0.66 and these 0.26.

The M = N / G query heads of a key head are worked on together. What is called a *query* here is a (token, head) pair;
the Q = T·M queries of a key head are counted token by token. So a tile of 128 queries spans 128 / M tokens only, which
wastes little at the diagonal and at the borders of documents, and shares the keys that it loads among the heads.

Every result has one program that sums it, in a fixed order. That takes two backward kernels, one for dq and one for dk
and dv, and the scores twice: 7 products where atomic additions would need 5. Exponentials are to base 2, which is what
the hardware has. The bounds of documents are on the device only: a program reads from `document_start_T` or
`document_end_T` how far it has to walk, and masks only those tiles that the diagonal or a document's bound cuts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below any score, and unlike −∞ with a difference to itself
SINK_BLOCK = 4096  # tokens at a time


class Tiles(NamedTuple):
    """Queries and keys of one program's tile of scores, and how the kernel is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int
    skip: bool = True
    """Whether tiles that need no mask branch around it. Branches among many registers make ptxas serialize products."""
    registers: int | None = None
    """The most registers of a thread: two programs of 8 warps fit on a multiprocessor with 128."""


LARGE_TILES = {
    ("forward", 64): Tiles(128, 64, warps=8, stages=3, registers=128),
    ("forward", 128): Tiles(128, 64, warps=8, stages=3),
    ("forward", 256): Tiles(128, 64, warps=8, stages=2, skip=False),
    ("backward_queries", 64): Tiles(128, 64, warps=8, stages=3, registers=128),
    ("backward_queries", 128): Tiles(128, 64, warps=8, stages=2),
    ("backward_queries", 256): Tiles(128, 32, warps=8, stages=2),
    ("backward_keys", 64): Tiles(64, 128, warps=8, stages=3),
    ("backward_keys", 128): Tiles(64, 128, warps=8, stages=2, skip=False),
    ("backward_keys", 256): Tiles(32, 64, warps=8, stages=2, skip=False),
}
SMALL_TILES = {
    ("forward", 64): Tiles(128, 64, warps=8, stages=2),
    ("forward", 128): Tiles(128, 32, warps=8, stages=2),
    ("forward", 256): Tiles(64, 32, warps=8, stages=2),
    ("backward_queries", 64): Tiles(64, 32, warps=4, stages=2),
    ("backward_queries", 128): Tiles(64, 32, warps=8, stages=2),
    ("backward_queries", 256): Tiles(32, 32, warps=8, stages=1),
    ("backward_keys", 64): Tiles(32, 64, warps=4, stages=2),
    ("backward_keys", 128): Tiles(32, 64, warps=8, stages=2),
    ("backward_keys", 256): Tiles(16, 32, warps=8, stages=1),
}


@triton.jit
def block_of_program(program, blocks, batch):
    """Which block a program works on: the first block of all rows, then the second of all rows, and so on.

    A block's work grows or falls along a row. Programs start in order, and the heaviest must not start last.
    """
    blocks_of_row = tl.cdiv(blocks, batch)
    return program % batch * blocks_of_row + program // batch


@triton.jit
def tile_pointers(
    x, first, g, T, stride, M: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Where (COUNT, WIDTH) numbers lie, from the first-th (token, head) pair on, M heads a token; and which exist."""
    token = first // M
    pair, column = (first % M + tl.arange(0, COUNT))[:, None], tl.arange(0, WIDTH)[None, :]
    x += token.to(tl.int64) * stride + g * M * D
    return x + pair // M * stride + pair % M * D + column, (pair // M < T - token) & (column < D)


@triton.jit
def load_tile(
    x, first, g, T, stride,
    M: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile at `tile_pointers`, zeros where nothing exists; `x` is a pointer, or with TMA a tensor descriptor."""
    if TMA:
        tile = x.load([first // M, g * M, 0]).reshape(COUNT, WIDTH)
    else:
        pointers, exists = tile_pointers(x, first, g, T, stride, M, D, COUNT, WIDTH)
        tile = tl.load(pointers, mask=exists, other=0.0)
    return tile


@triton.jit
def store_tile(x, tile, first, g, T, stride, M: tl.constexpr, D: tl.constexpr):
    pointers, exists = tile_pointers(x, first, g, T, stride, M, D, tile.shape[0], tile.shape[1])
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=exists)


@triton.jit
def load_numbers(x, first, g, Q, stride, COUNT: tl.constexpr, TMA: tl.constexpr):
    """One number a query of COUNT queries; zeros past the end."""
    if TMA:
        numbers = x.load([g, first]).reshape(COUNT)
    else:
        query = first + tl.arange(0, COUNT)
        numbers = tl.load(x + g * stride + query, mask=query < Q, other=0.0)
    return numbers


@triton.jit
def visible_keys(start, first, T, M: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which keys a block of queries sees: each query those from its `begin` to its `token`, the block `low` to `high`.

    From `low` to `cut` whole tiles of keys are visible to all queries. There are such only if the block lies within one
    document: a document that starts inside the block has no key before the block's first token.
    """
    token = tl.minimum((first + tl.arange(0, QUERIES)) // M, T - 1)
    begin = tl.load(start + token)
    first_token, last_token = first // M, tl.minimum((first + QUERIES - 1) // M, T - 1)
    low = tl.load(start + first_token)
    is_one_document = tl.load(start + last_token) == low
    cut = low + tl.where(is_one_document, (first_token + 1 - low) // KEYS * KEYS, 0)
    return token, begin, low, cut, last_token + 1


@triton.jit
def attention_forward(
    q, k, v, sinks, start, out, lse, T, batch, q_stride, k_stride, v_stride, lse_stride,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SKIP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Output and log₂ Σ 2^score, sink included, of a block of queries."""
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    g, G, Q = tl.program_id(0), tl.num_programs(0), T * M
    program = tl.num_programs(1) - 1 - tl.program_id(1)  # queries late in a row see the most keys
    first = block_of_program(program, tl.cdiv(Q, QUERIES), batch) * QUERIES
    if first >= Q:
        return
    token, begin, low, cut, high = visible_keys(start, first, T, M, QUERIES, KEYS)
    query = first + tl.arange(0, QUERIES)
    q_tile = load_tile(q, first, g, T, q_stride, M, D, QUERIES, WIDTH, False)
    if sinks is None:
        largest, total = tl.full((QUERIES,), LOWEST, tl.float32), tl.zeros((QUERIES,), tl.float32)
    else:
        largest, total = tl.load(sinks + g * M + query % M) * LOG2_E, tl.full((QUERIES,), 1.0, tl.float32)
    weighted = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first_key in range(low, high, KEYS):
        k_tile = load_tile(k, first_key, g, T, k_stride, 1, D, KEYS, WIDTH, TMA)
        v_tile = load_tile(v, first_key, g, T, v_stride, 1, D, KEYS, WIDTH, TMA)
        scores = tl.dot(q_tile, k_tile.T)
        if not SKIP or first_key >= cut:
            key = first_key + tl.arange(0, KEYS)[None, :]
            scores = tl.where((key >= begin[:, None]) & (key <= token[:, None]), scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        exponentials = tl.exp2(scores * SCALE - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(exponentials, 1)
        weighted = tl.dot(exponentials.to(v_tile.dtype), v_tile, weighted * shrink[:, None])
        largest = new_largest
    store_tile(out, weighted / total[:, None], first, g, T, G * M * D, M, D)
    tl.store(lse + g * lse_stride + query, largest + tl.log2(total), mask=query < Q)


@triton.jit
def attention_backward_queries(
    q, k, v, grad, out, start, lse, delta, dq, T, batch, q_stride, k_stride, v_stride, lse_stride,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SKIP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and delta = rowsum(dO ∘ O), which the other backward kernels read."""
    SCALE: tl.constexpr = D**-0.5
    g, G, Q = tl.program_id(0), tl.num_programs(0), T * M
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    first = block_of_program(program, tl.cdiv(Q, QUERIES), batch) * QUERIES
    if first >= Q:
        return
    token, begin, low, cut, high = visible_keys(start, first, T, M, QUERIES, KEYS)
    query = first + tl.arange(0, QUERIES)
    q_tile = load_tile(q, first, g, T, q_stride, M, D, QUERIES, WIDTH, False)
    grad_tile = load_tile(grad, first, g, T, G * M * D, M, D, QUERIES, WIDTH, False)
    out_tile = load_tile(out, first, g, T, G * M * D, M, D, QUERIES, WIDTH, False)
    own_lse = tl.load(lse + g * lse_stride + query, mask=query < Q, other=0.0)
    own_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + g * lse_stride + query, own_delta, mask=query < Q)
    dq_tile = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first_key in range(low, high, KEYS):
        k_tile = load_tile(k, first_key, g, T, k_stride, 1, D, KEYS, WIDTH, TMA)
        v_tile = load_tile(v, first_key, g, T, v_stride, 1, D, KEYS, WIDTH, TMA)
        scores = tl.dot(q_tile, k_tile.T)
        dp = tl.dot(grad_tile, v_tile.T)
        p = tl.exp2(scores * (SCALE * LOG2_E) - own_lse[:, None])
        if not SKIP or first_key >= cut:
            key = first_key + tl.arange(0, KEYS)[None, :]
            p = tl.where((key >= begin[:, None]) & (key <= token[:, None]), p, 0.0)
        dscores = p * (dp - own_delta[:, None])
        dq_tile = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile)
    store_tile(dq, dq_tile * SCALE, first, g, T, G * M * D, M, D)


@triton.jit
def attention_backward_keys(
    q, k, v, grad, end, lse, delta, dk, dv, T, batch, q_stride, k_stride, v_stride, lse_stride,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SKIP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. The tiles are transposed, keys by queries: so both sums take them as they are."""
    SCALE: tl.constexpr = D**-0.5
    g, G, Q = tl.program_id(0), tl.num_programs(0), T * M
    first = block_of_program(tl.program_id(1), tl.cdiv(T, KEYS), batch) * KEYS
    if first >= T:
        return
    key = first + tl.arange(0, KEYS)
    last = tl.minimum(first + KEYS, T) - 1
    stop = tl.load(end + tl.minimum(key, T - 1)) * M  # of the queries that see the key
    high = tl.load(end + last) * M
    # Tiles before `cut` are masked. If the keys are of one document, it is the diagonal that they cut.
    is_one_document = tl.load(end + first) * M == high
    cut = tl.where(is_one_document, last * M, high)
    k_tile = load_tile(k, first, g, T, k_stride, 1, D, KEYS, WIDTH, False)
    v_tile = load_tile(v, first, g, T, v_stride, 1, D, KEYS, WIDTH, False)
    dk_tile, dv_tile = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for first_query in range(first * M, high, QUERIES):
        q_tile = load_tile(q, first_query, g, T, q_stride, M, D, QUERIES, WIDTH, TMA)
        grad_tile = load_tile(grad, first_query, g, T, G * M * D, M, D, QUERIES, WIDTH, TMA)
        tile_lse = load_numbers(lse, first_query, g, Q, lse_stride, QUERIES, TMA)
        tile_delta = load_numbers(delta, first_query, g, Q, lse_stride, QUERIES, TMA)
        scores = tl.dot(k_tile, q_tile.T)
        dp = tl.dot(v_tile, grad_tile.T)
        p = tl.exp2(scores * (SCALE * LOG2_E) - tile_lse[None, :])
        if not SKIP or (first_query < cut) | (first_query + QUERIES > high):
            query = first_query + tl.arange(0, QUERIES)[None, :]
            p = tl.where((query >= (key * M)[:, None]) & (query < stop[:, None]), p, 0.0)
        dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile)
        dscores = p * (dp - tile_delta[None, :])
        dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile)
    store_tile(dk, dk_tile * SCALE, first, g, T, G * D, 1, D)
    store_tile(dv, dv_tile, first, g, T, G * D, 1, D)


@triton.jit
def attention_backward_sinks(sinks, lse, delta, dsinks, T, lse_stride, M: tl.constexpr, BLOCK: tl.constexpr):
    """−Σ exp(sink − lse) · delta over all tokens, of one head."""
    n = tl.program_id(0)
    sink = tl.load(sinks + n) * LOG2_E
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, T, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at = n // M * lse_stride + token * M + n % M
        own_lse = tl.load(lse + at, mask=token < T, other=float("inf"))
        sums += tl.exp2(sink - own_lse) * tl.load(delta + at, mask=token < T, other=0.0)
    tl.store(dsinks + n, -tl.sum(sums))


def forward(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    sinks_N: Tensor | None,
    document_start_T: Tensor,
    batch: int,
    lse_GQ: Tensor,
) -> Tensor:
    """The output; writes the queries' log-sum-exps into `lse_GQ`."""
    (tokens, heads, head_dim), key_heads = q_TND.shape, k_TGD.shape[1]
    sharing, width, tma = heads // key_heads, padded_width(head_dim), uses_tma(q_TND.device)
    tiles = choose_tiles("forward", width, q_TND.device)
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    attention_forward[_grid(key_heads, tokens * sharing, tiles.queries, batch)](
        q_TND, *(_tiled(x, tiles.keys, 1, width, tma) for x in (k_TGD, v_TGD)), sinks_N, document_start_T, out_TND,
        lse_GQ, tokens, batch, q_TND.stride(0), k_TGD.stride(0), v_TGD.stride(0), lse_GQ.stride(0),
        sharing, head_dim, width, tiles.queries, tiles.keys, tiles.skip, tma,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return out_TND


def backward_queries(
    grad_TND: Tensor, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, document_start_T: Tensor, batch: int,
    out_TND: Tensor, lse_GQ: Tensor, delta_GQ: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of q_TND; writes rowsum(dO ∘ O) into `delta_GQ`."""
    (tokens, heads, head_dim), key_heads = q_TND.shape, k_TGD.shape[1]
    sharing, width, tma = heads // key_heads, padded_width(head_dim), uses_tma(q_TND.device)
    tiles = choose_tiles("backward_queries", width, q_TND.device)
    dq_TND = torch.empty_like(out_TND)
    attention_backward_queries[_grid(key_heads, tokens * sharing, tiles.queries, batch)](
        q_TND, *(_tiled(x, tiles.keys, 1, width, tma) for x in (k_TGD, v_TGD)), grad_TND, out_TND, document_start_T,
        lse_GQ, delta_GQ, dq_TND, tokens, batch, q_TND.stride(0), k_TGD.stride(0), v_TGD.stride(0), lse_GQ.stride(0),
        sharing, head_dim, width, tiles.queries, tiles.keys, tiles.skip, tma,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return dq_TND


def backward_keys(
    grad_TND: Tensor, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, document_end_T: Tensor, batch: int,
    lse_GQ: Tensor, delta_GQ: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k_TGD and v_TGD."""
    (tokens, heads, head_dim), key_heads = q_TND.shape, k_TGD.shape[1]
    sharing, width = heads // key_heads, padded_width(head_dim)
    tiles = choose_tiles("backward_keys", width, q_TND.device)
    # A tile that TMA loads holds whole tokens and has sides that are powers of two.
    tma = uses_tma(q_TND.device) and tiles.queries % sharing == 0
    numbers = (lse_GQ, delta_GQ)
    if tma:
        shape, strides = [key_heads, tokens * sharing], [lse_GQ.stride(0), 1]
        numbers = tuple(TensorDescriptor(x, shape, strides, [1, tiles.queries]) for x in numbers)
    dk_TGD, dv_TGD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_TGD, v_TGD))
    q, grad = (_tiled(x, tiles.queries, sharing, width, tma) for x in (q_TND, grad_TND))
    attention_backward_keys[_grid(key_heads, tokens, tiles.keys, batch)](
        q, k_TGD, v_TGD, grad, document_end_T, *numbers, dk_TGD, dv_TGD,
        tokens, batch, q_TND.stride(0), k_TGD.stride(0), v_TGD.stride(0), lse_GQ.stride(0),
        sharing, head_dim, width, tiles.queries, tiles.keys, tiles.skip, tma,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return dk_TGD, dv_TGD


def backward_sinks(sinks_N: Tensor, lse_GQ: Tensor, delta_GQ: Tensor, tokens: int) -> Tensor:
    """The gradient of sinks_N."""
    dsinks_N = torch.empty_like(sinks_N)
    sharing = len(sinks_N) // len(lse_GQ)
    attention_backward_sinks[(len(sinks_N),)](
        sinks_N, lse_GQ, delta_GQ, dsinks_N, tokens, lse_GQ.stride(0), sharing, SINK_BLOCK, num_warps=8
    )
    return dsinks_N


def padded_width(head_dim: int) -> int:
    """The width of a tile: a power of two, and at least what one tensor core instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


def uses_tma(device: torch.device) -> bool:
    """Whether tiles are loaded through the tensor memory accelerator: where the tensor cores read shared memory."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose_tiles(kernel: str, width: int, device: torch.device) -> Tiles:
    """What was fastest on an H100; on other GPUs what fits 99 KiB of shared memory and 255 registers."""
    tiles = LARGE_TILES if uses_tma(device) else SMALL_TILES
    return tiles[kernel, max(64, width)]


def _tiled(x_TXD: Tensor, count: int, sharing: int, width: int, tma: bool) -> Tensor | TensorDescriptor:
    """`x_TXD` in the form that `load_tile` takes, for tiles of `count` (token, head) pairs."""
    if not tma:
        return x_TXD
    strides = [x_TXD.stride(0), x_TXD.shape[2], 1]
    return TensorDescriptor(x_TXD, list(x_TXD.shape), strides, [count // sharing, sharing, width])


def _grid(key_heads: int, length: int, block: int, batch: int) -> tuple[int, int]:
    """Key heads, and blocks of a row times rows, see `block_of_program`."""
    return key_heads, triton.cdiv(triton.cdiv(length, block), batch) * batch
