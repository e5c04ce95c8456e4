"""AdamW (arXiv 1711.05101) on bfloat16 matrices whose float32 masters cost no memory of their own.

A float32 master is kept as the bfloat16 number nearest to it, which is what layers compute with, and the distance in
units of the master's last place, an int16. The two give the master back bit for bit.

Moments may be bfloat16 too (as in DeepSeek-V3, arXiv 2412.19437, section 3.3.3). Then they are rounded stochastically:
rounded to nearest, a moment would lose every change below 2^-9 of itself, and with beta2 near 1 a second moment would
never change. The noise is a hash of the update's and the element's number, so the same run draws the
same noise, also after a resume.

The Triton form is in `adamw_triton`, imported only when the matrix is on a GPU.
"""

import torch
from torch import Tensor

from p828.kernels.adamw_state import MatrixState, Update

PLAIN_BLOCK = 2**18  # elements that the plain twin works on at a time, so that its many passes stay in the cache
LOW_32_BITS = 0xFFFFFFFF


def adamw_(state: MatrixState, update: Update, weight_decay: float, number: int) -> None:
    """Update one matrix in place. `number`, another one for every matrix, keeps their noise apart."""
    if state.weight.is_cuda:
        from p828.kernels.adamw_triton import adamw_triton_

        adamw_triton_(state, update, weight_decay, number)
    else:
        adamw_plain_(state, update, weight_decay, number)


def adamw_plain_(state: MatrixState, update: Update, weight_decay: float, number: int) -> None:
    """The plain twin: the same roundings in the same order, so the same bits."""
    if update.found_inf:
        return
    beta1, beta2 = update.betas
    step_size = update.learning_rate * update.corrections[0]
    blocks = zip(*(tensor.view(-1).split(PLAIN_BLOCK) for tensor in state), strict=True)
    for block, (weight, low_bits, gradient, exp_avg, exp_avg_sq) in enumerate(blocks):
        gradient = gradient * update.clip
        first, second = exp_avg.float(), exp_avg_sq.float()
        first = first + (gradient - first) * (1 - beta1)
        second = second + (gradient * gradient - second) * (1 - beta2)
        # By way of float64, because PyTorch's root of float32 on a CPU may be off by a unit in the last place.
        root = second.double().sqrt().float() * update.corrections[1] + update.eps
        master = join_float32(weight, low_bits) * (1 - update.learning_rate * weight_decay)
        high, low = split_float32(master - step_size * first / root)
        weight.copy_(high)
        low_bits.copy_(low)
        if exp_avg.dtype == torch.bfloat16:
            noise = random_bits(block * PLAIN_BLOCK, len(weight), update.updates, number)
            first, second = round_stochastically(first, noise & 0xFFFF), round_stochastically(second, noise >> 16)
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)


def bias_corrections(betas: tuple[float, float], updates: Tensor) -> Tensor:
    """1 / (1 − beta1^t) and 1 / sqrt(1 − beta2^t) of update t = `updates` + 1: float32 (2,), computed in float64."""
    t = (updates + 1).double()
    return torch.stack((1 / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt())).float()


def split_float32(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the nearest bfloat16, halves away from zero, and an int16 low_bits: `join_float32` gives it back.

    Halves to even, as PyTorch rounds, would need a 17th bit. What is nearer to 2^128 than to the largest bfloat16
    becomes infinity, as always in rounding, and still joins to what it was.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_float32(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 low_bits."""
    return ((weight.view(torch.int16).int() << 16) + low_bits).view(torch.float32)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """float32 to one of its two neighbours in bfloat16, the nearer the likelier, so that the mean is x.

    `noise` (int64) is uniform over 0 … 2^16 − 1: added below the bits that stay, it carries into them that often.
    """
    return ((x.view(torch.int32) + noise.int()) >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(start: int, count: int, updates: Tensor, number: int) -> Tensor:
    """32 random bits for each of the elements from `start` on: int64."""
    key = _hash(updates * 0x9E3779B9 + number)
    return _hash(torch.arange(start, start + count, device=updates.device) ^ key)


def _hash(x: Tensor) -> Tensor:
    """32 bits to 32 well mixed bits ("lowbias32" of github.com/skeeto/hash-prospector), held in int64."""
    x = x & LOW_32_BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW_32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW_32_BITS
    return x ^ (x >> 16)
