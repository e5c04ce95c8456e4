"""Normal random numbers that every device computes to the same bits, each from its place alone.

A generator with a state draws one number after another. Here a number is a function of a key and of its index, so that
a GPU makes millions at once, a rank makes its own slice only, and neither changes a bit of what comes out. The bits
are the same because every operation is exact on integers, or is a float32 addition, multiplication, division, square
root or conversion, which IEEE 754 rounds in one way only. Logarithms and the like differ in their last bits from
library to library, and a product that is fused with a sum is rounded once instead of twice: so each operation is a
call of its own, and must not be compiled.

Sources:

- SplitMix64, random numbers from a counter: Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
  OOPSLA 2014, with the constants of Stafford's variant 13 in `mix` as in Java's and Vigna's code.
- From a uniform to a normal number: Wichura, "Algorithm AS 241: the percentage points of the normal distribution",
  Applied Statistics 37 (1988), its routine PPND7, good to about 1 part in 10^7.
- The logarithm in it: FreeBSD's `e_logf.c` (Sun's fdlibm in float32).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from p828.model.backend import RANDOM_BLOCK

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

CENTRAL_NUMERATOR = (5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179)  # highest power first
CENTRAL_DENOMINATOR = (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0)
TAIL_NUMERATOR = (1.7023821103e-1, 1.3067284816, 2.7568153900, 1.4234372777)
TAIL_DENOMINATOR = (1.2021132975e-1, 7.3700164250e-1, 1.0)
LOGARITHM = (0.24279078841, 0.28498786688, 0.40000972152, 0.66666662693, 2.0)
LN_2 = 0.69314718056
ROOT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as a float32


class Key(NamedTuple):
    """Which sequence of numbers: the start and the odd step of a SplitMix64 generator, 64 bits each."""

    start: int
    gamma: int


def make_key(seed: int, name: str) -> Key:
    """The sequence that belongs to a name under a seed; other names and other seeds have unrelated ones."""
    state = _mix_int(seed & MASK)
    for byte in name.encode():
        state = _mix_int((state + GOLDEN_GAMMA + byte) & MASK)
    gamma = _mix_int((state + GOLDEN_GAMMA) & MASK) | 1
    if (gamma ^ (gamma >> 1)).bit_count() < 24:  # too regular a step, says the paper
        gamma ^= 0xAAAAAAAAAAAAAAAA
    return Key(state, gamma)


@torch.no_grad()
def fill_normal_(values: Tensor, std: float, key: Key, start: int = 0, block: int | None = None) -> None:
    """Overwrite `values` (float32, contiguous) by the numbers `start`, `start` + 1, … of a key's sequence, times `std`.

    They are normal with mean 0 and the standard deviation `std`, none beyond 6.4 of these. How many are made at a time,
    `block`, changes none of them.
    """
    flat = values.detach().view(-1)
    block = min(block or RANDOM_BLOCK[values.device.type], max(len(flat), 1))
    steps = torch.arange(block, device=values.device).mul_(_signed(key.gamma))
    for begin in range(0, len(flat), block):
        part = flat[begin : begin + block]
        first = _signed(key.start + (start + begin + 1) * key.gamma)
        random = mix(steps[: len(part)] + first).bitwise_right_shift_(32).int()
        torch.mul(inverse_normal(random), std, out=part)


@torch.no_grad()
def fill_uniform_(values: Tensor, key: Key, start: int = 0) -> None:
    """Overwrite `values` (float32, contiguous) by a key's sequence of numbers from 0 to below 1, in steps of 2^-24.

    `start` is the place in the sequence of the first one.
    """
    flat = values.detach().view(-1)
    steps = torch.arange(start + 1, start + len(flat) + 1, device=values.device).mul_(_signed(key.gamma))
    flat.copy_(_shifted(mix(steps + _signed(key.start)), 40)).mul_(2.0**-24)


def mix(x: Tensor) -> Tensor:
    """64 bits (int64) to 64 well mixed bits, in place: the output function of SplitMix64."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_signed(MIX_1))  # overflow wraps around
    x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(MIX_2))
    return x.bitwise_xor_(_shifted(x, 31))


def inverse_normal(random: Tensor) -> Tensor:
    """32 random bits (int32) to a normal number (float32): the inverse of its cumulative distribution.

    The first bit is the sign. The other 31, m, say how much of the distribution lies beyond: (m + 1/2) / 2^32.
    """
    beyond = (random ^ (random >> 31)).float().add_(0.5).mul_(2.0**-32)
    from_median = 0.5 - beyond
    r = (from_median * from_median).neg_().add_(0.180625)
    positive = _polynomial(r, CENTRAL_NUMERATOR).div_(_polynomial(r, CENTRAL_DENOMINATOR)).mul_(from_median)
    in_tail = (from_median > 0.425).nonzero()[:, 0]  # 15 of 100
    positive.index_copy_(0, in_tail, _tail(beyond[in_tail]))
    sign = random.bitwise_and(-(2**31))
    return positive.view(torch.int32).bitwise_or_(sign).view(torch.float32)


def _tail(beyond: Tensor) -> Tensor:
    # By way of float64, because PyTorch's root of float32 on a CPU may be off by a unit in the last place.
    r = _minus_log(beyond).double().sqrt_().float().sub_(1.6)
    return _polynomial(r, TAIL_NUMERATOR).div_(_polynomial(r, TAIL_DENOMINATOR))


def _minus_log(x: Tensor) -> Tensor:
    """−ln x of positive, normal float32 numbers: x = 2^k · m with m from sqrt(1/2) to sqrt(2)."""
    bits = x.view(torch.int32)
    k = (bits - ROOT_HALF_BITS).bitwise_right_shift_(23)
    m = (bits - (k << 23)).view(torch.float32)
    s = (m - 1).div_(m + 1)
    return _polynomial(s * s, LOGARITHM).mul_(s).add_(k.float().mul_(LN_2)).neg_()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """By Horner's rule, in a new tensor; the coefficient of the highest power comes first."""
    first, second, *others = coefficients
    total = (x * first).add_(second)
    for coefficient in others:
        total.mul_(x).add_(coefficient)
    return total


def _shifted(x: Tensor, count: int) -> Tensor:
    """The bits of int64 numbers shifted to the right, zeros coming in; `>>` alone repeats the sign."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix_int(x: int) -> int:
    """`mix` of one number, in Python."""
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 number with the last 64 bits of `x`."""
    return ((x + 2**63) & MASK) - 2**63
