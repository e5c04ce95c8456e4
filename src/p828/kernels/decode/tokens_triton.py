"""A step's two ends: the newest tokens' embeddings, and the next tokens from their logits.

In PyTorch these are some twenty launches, as long together as a layer. The next token is drawn as in
`p828.inference.sampling`: where the probabilities, summed in the order of the tokens, first exceed a uniform number.
Programs take blocks of the vocabulary, and leave a block's maximum and sum; the last to arrive sums over the blocks and
looks for the token in one of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.decode.dependent_launch_triton import launch, let_next_kernel_begin, wait_for_earlier_kernels

BLOCK = 2048  # logits of a program
WARPS = 8


@triton.jit
def embed_tokens(embedding, slots, token_of_slot, x, H, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    let_next_kernel_begin(PDL)
    wait_for_earlier_kernels(PDL)
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    slot = tl.load(slots + row)
    token = tl.load(token_of_slot + slot).to(tl.int64)
    value = tl.load(embedding + token * H + column, mask=column < H, other=0.0)
    tl.store(x + row * H + column, value, mask=column < H)


@triton.jit
def drawn_token(logits_at, maxima, sums, likeliest, temperature, uniform, V, part, BLOCK: tl.constexpr):
    """The token at which the summed probabilities first exceed the uniform number.

    A block's sum is of exp((logit − its maximum) / temperature).
    """
    highest = tl.max(maxima, 0)
    sums *= tl.exp((maxima - highest) / temperature)
    through = tl.cumsum(sums, 0)
    threshold = uniform * tl.sum(sums, 0)
    block = tl.sum((through <= threshold).to(tl.int32), 0)
    before = tl.sum(tl.where(part == block, through - sums, 0.0), 0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_at + place, mask=place < V, other=float("-inf"))
    through = before + tl.cumsum(tl.exp((logits - highest) / temperature), 0)
    token = block * BLOCK + tl.sum(((through <= threshold) & (place < V)).to(tl.int32), 0)
    # Rounded up, a number just below 1 may reach the sum of all.
    return tl.where(token < V, token, likeliest)


@triton.jit
def choose(
    logits, slots, temperature_of_slot, uniform, token_of_slot, position_of_slot, told, out, block_maxima, block_sums,
    block_places, arrivals, V, C, BLOCKS, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    temperature = tl.load(temperature_of_slot + slot)
    position = tl.minimum(tl.load(position_of_slot + slot) + 1, C - 1)
    number = tl.load(uniform + slot * C + position)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    wait_for_earlier_kernels(PDL)
    place = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * V + place, mask=place < V, other=float("-inf"))
    is_finite = (tl.abs(value) < float("inf")) | (place >= V)
    value = tl.where(is_finite, value, float("-inf"))
    highest = tl.max(value, 0)
    at = row * BLOCKS + block
    tl.store(block_maxima + at, highest)
    tl.store(block_places + at, tl.where(tl.min(is_finite.to(tl.int32), 0) == 1, tl.argmax(value, 0), -1))
    tl.store(block_sums + at, tl.sum(tl.exp((value - highest) / divisor), 0))
    tl.debug_barrier()  # the count is one thread's; it publishes what all of them have written
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == BLOCKS - 1:
        tl.debug_barrier()
        part = tl.arange(0, PARTS)
        mask, of_part = part < BLOCKS, row * BLOCKS + part
        maxima = tl.load(block_maxima + of_part, mask=mask, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(block_sums + of_part, mask=mask, other=0.0, cache_modifier=".cg")
        places = tl.load(block_places + of_part, mask=mask, other=0, cache_modifier=".cg")
        best = tl.argmax(maxima, 0)
        token = best * BLOCK + tl.sum(tl.where(part == best, places, 0), 0)
        if temperature > 0:
            token = drawn_token(logits + row * V, maxima, sums, token, temperature, number, V, part, BLOCK)
        token = tl.where(tl.min(places, 0) < 0, -1, token)
        tl.store(out + row, token.to(tl.int64))
        tl.store(told + slot * C + position, token.to(tl.int32))
        tl.store(token_of_slot + slot, tl.maximum(token, 0).to(tl.int64))
        tl.store(position_of_slot + slot, position)
        tl.store(arrivals + row, 0)


def embed(embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor) -> Tensor:
    tokens, hidden = len(slots_T), embedding_VH.shape[1]
    x_TH = embedding_VH.new_empty(tokens, hidden)
    launch(
        embed_tokens, (tokens,),
        embedding_VH, slots_T, token_S, x_TH, hidden, triton.next_power_of_2(hidden),
        device=x_TH.device, rows=tokens, warps=4, is_first=True,
    )  # fmt: skip
    return x_TH


def choose_tokens(
    logits_TV: Tensor, slots_T: Tensor, temperature_S: Tensor, uniform_SC: Tensor, token_S: Tensor, position_S: Tensor,
    told_SC: Tensor, arrivals_T: Tensor,
) -> Tensor:  # fmt: skip
    tokens, width = logits_TV.shape
    blocks = triton.cdiv(width, BLOCK)
    token_T = torch.empty(tokens, dtype=torch.int64, device=logits_TV.device)
    maxima, sums = (logits_TV.new_empty(tokens, blocks) for _ in range(2))
    places = torch.empty(tokens, blocks, dtype=torch.int32, device=logits_TV.device)
    launch(
        choose, (blocks, tokens),
        logits_TV, slots_T, temperature_S, uniform_SC, token_S, position_S, told_SC, token_T, maxima, sums, places,
        arrivals_T, width, uniform_SC.shape[1], blocks, max(triton.next_power_of_2(blocks), 2), BLOCK,
        device=logits_TV.device, rows=tokens, warps=WARPS,
    )  # fmt: skip
    return token_T
