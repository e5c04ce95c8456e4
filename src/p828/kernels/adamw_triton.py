"""`adamw_` on a GPU: one pass over a matrix, 12 bytes an element read and 8 written with bfloat16 moments.

Why our own: PyTorch's fused AdamW knows neither a master in two parts nor moments that are rounded stochastically.
Division and root are rounded as IEEE 754 has it and no product is fused with a sum, so that the plain twin gives the
same bits; memory is what the pass waits for, so this costs nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p828.kernels.adamw_state import MatrixState, Update

BLOCK = 1024  # elements of a program: 8 for each thread of 4 warps, 16 bytes in bfloat16


@triton.jit
def adamw_hash(x):
    """`p828.kernels.adamw._hash`; x is uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def adamw_load_moment(pointer, at, mask):
    """float32 from float32, or from the 16 bits of a bfloat16."""
    x = tl.load(pointer + at, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def adamw_store_moment(pointer, at, x, noise, mask):
    if pointer.dtype.element_ty == tl.int16:
        x = ((x.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16).to(tl.int16)
    tl.store(pointer + at, x, mask=mask)


@triton.jit(do_not_specialize=["number"])
def adamw_update(
    weight, low_bits, gradient, exp_avg, exp_avg_sq, clip, found_inf, updates, corrections,
    learning_rate, decay, share1, share2, eps, number, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """`decay` is 1 − learning rate · weight decay; the shares are 1 − beta. bfloat16 tensors come as their bits."""
    if tl.load(found_inf) != 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    g = tl.load(gradient + at, mask=mask, other=0.0) * tl.load(clip)
    first = adamw_load_moment(exp_avg, at, mask)
    second = adamw_load_moment(exp_avg_sq, at, mask)
    first = first + (g - first) * share1
    second = second + (g * g - second) * share2
    root = tl.sqrt_rn(second) * tl.load(corrections + 1) + eps

    high = tl.load(weight + at, mask=mask, other=0).to(tl.int32)
    low = tl.load(low_bits + at, mask=mask, other=0).to(tl.int32)
    master = ((high << 16) + low).to(tl.float32, bitcast=True) * decay
    step_size = learning_rate * tl.load(corrections)
    bits = (master - tl.div_rn(step_size * first, root)).to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    tl.store(weight + at, high.to(tl.int16), mask=mask)
    tl.store(low_bits + at, (bits - (high << 16)).to(tl.int16), mask=mask)

    key = adamw_hash(tl.load(updates).to(tl.uint32) * 0x9E3779B9 + number.to(tl.uint32))
    noise = adamw_hash(at.to(tl.uint32) ^ key)
    adamw_store_moment(exp_avg, at, first, noise & 0xFFFF, mask)
    adamw_store_moment(exp_avg_sq, at, second, noise >> 16, mask)


def adamw_triton_(state: MatrixState, update: Update, weight_decay: float, number: int) -> None:
    numel = state.weight.numel()
    beta1, beta2 = update.betas
    adamw_update[(triton.cdiv(numel, BLOCK),)](
        *(_bits(tensor) for tensor in state),
        update.clip, update.found_inf, update.updates, update.corrections,
        update.learning_rate, 1 - update.learning_rate * weight_decay, 1 - beta1, 1 - beta2, update.eps, number, numel,
        BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
