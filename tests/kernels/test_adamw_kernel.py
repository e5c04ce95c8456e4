"""AdamW over split masters against torch's own; the splitting and the rounding against exact arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from p828.kernels.adamw import (
    adamw_,
    bias_corrections,
    join_float32,
    random_bits,
    round_stochastically,
    split_float32,
)
from p828.kernels.adamw_state import MatrixState, Update

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def make_state(master: Tensor, moment_dtype: torch.dtype) -> MatrixState:
    zeros = torch.zeros_like(master, dtype=moment_dtype)
    return MatrixState(*split_float32(master), torch.zeros_like(master), zeros, zeros.clone())


def make_update(updates: int, clip: float = 1.0, betas: tuple[float, float] = BETAS, found_inf: bool = False) -> Update:
    count = torch.tensor(updates)
    corrections = bias_corrections(betas, count)
    return Update(0.01, betas, EPS, torch.tensor(clip), torch.tensor(float(found_inf)), count, corrections)


def some_floats() -> Tensor:
    """float32 of all kinds: any bits, halfway between bfloat16 numbers, denormal, zeros, infinities, NaN, extremes."""
    any_bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).int()
    halfway = any_bits[:1000] & ~0xFFFF | 0x8000
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 3.4028235e38, -3.4028235e38]
    )
    top = torch.arange(0x7F7F0000, 0x7F800001, 97, dtype=torch.int64).int()  # up to infinity
    return torch.cat((any_bits.view(torch.float32), halfway.view(torch.float32), special, top.view(torch.float32)))


def test_split_and_join_are_exact_for_any_bits() -> None:
    floats = some_floats()
    weight, low_bits = split_float32(floats)
    assert (weight.dtype, low_bits.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_float32(weight, low_bits).view(torch.int32), floats.view(torch.int32))


def test_the_weight_is_the_nearest_bfloat16() -> None:
    """As PyTorch rounds, but for halves, which go away from zero."""
    floats = some_floats()
    floats = floats[floats.isfinite()]
    weight, low_bits = split_float32(floats)
    is_half = low_bits == -0x8000
    assert 500 < is_half.sum() < 2000
    assert torch.equal(weight[~is_half], floats[~is_half].bfloat16())
    assert (weight[is_half].double().abs() > floats[is_half].double().abs()).all()


def test_stochastic_rounding_is_exact_on_average() -> None:
    """Over all 2^16 values of the noise the mean is the number itself."""
    every = torch.arange(2**16)
    for x in (1.0, -1.2345678, 3.3e-5, -7e30, 1e-39, 0.0):
        value = torch.tensor(x)
        rounded = round_stochastically(value.expand(2**16), every)
        assert len(rounded.unique()) <= 2
        assert rounded.double().mean().item() == value.item()


def test_random_bits_are_even_and_differ_between_elements_updates_and_matrices() -> None:
    draws = [
        random_bits(0, 2**14, torch.tensor(updates), number) for updates, number in ((0, 0), (1, 0), (0, 1), (7, 3))
    ]
    for bits in draws:
        assert 0 <= bits.min() <= bits.max() < 2**32
        ones = (bits[:, None] >> torch.arange(32) & 1).double().mean(0)
        # A fair coin's share over 2^14 throws has a deviation of 0.004.
        assert (ones - 0.5).abs().max() < 5 * 0.004
    for i, first in enumerate(draws):
        for second in draws[:i]:
            agree = ((first ^ second)[:, None] >> torch.arange(32) & 1).double().mean(0)
            assert (agree - 0.5).abs().max() < 5 * 0.004
    assert torch.equal(random_bits(100, 50, torch.tensor(7), 3), draws[3][100:150])


def run(state: MatrixState, gradients: list[Tensor], clip: float) -> None:
    for updates, gradient in enumerate(gradients):
        state.gradient.copy_(gradient)
        adamw_(state, make_update(updates, clip), DECAY, number=5)


def torch_adamw(master: Tensor, gradients: list[Tensor], clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """50 steps of torch.optim.AdamW in float64."""
    twin = torch.nn.Parameter(master.double())
    optimizer = torch.optim.AdamW([twin], lr=0.01, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        twin.grad = clip * gradient.double()
        optimizer.step()
    return twin.detach(), optimizer.state[twin]


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_float32_moments_are_torchs_adamw(clip: float) -> None:
    master, gradients = torch.randn(30, 70), [torch.randn(30, 70) for _ in range(50)]
    state = make_state(master, torch.float32)
    run(state, gradients, clip)
    twin, moments = torch_adamw(master, gradients, clip)
    # 50 steps of some roundings of 2^-24 each, relative to weights of up to 4
    torch.testing.assert_close(join_float32(*state[:2]).double(), twin, rtol=0, atol=50 * 4 * 2**-24)
    torch.testing.assert_close(state.exp_avg.double(), moments["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.exp_avg_sq.double(), moments["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_bfloat16_moments_are_right_on_average() -> None:
    master, gradients = torch.randn(300, 300), [torch.randn(300, 300) for _ in range(50)]
    state = make_state(master, torch.bfloat16)
    run(state, gradients, 1.0)
    twin, moments = torch_adamw(master, gradients, 1.0)
    for ours, theirs in ((state.exp_avg, moments["exp_avg"]), (state.exp_avg_sq, moments["exp_avg_sq"])):
        error = ours.double() - theirs
        # A rounding errs by up to 2^-7 of the number; those of 1 / (1 − beta) = 10 or 20 updates add as their root.
        assert error.abs().max() < 2**-7 * theirs.abs().max() * 4
        # No bias: the mean of 90,000 independent errors is near zero within some deviations of a mean.
        assert error.mean().abs() < 4 * error.std() / 300
    change = join_float32(*state[:2]).double() - master
    assert (change - (twin - master)).norm() < 0.02 * (twin - master).norm()


def test_a_slow_second_moment_still_moves() -> None:
    """With beta2 = 0.999 a step changes it by a thousandth, which rounding to nearest bfloat16 would lose."""
    betas = (0.9, 0.999)
    state = make_state(torch.zeros(100, 100), torch.bfloat16)
    state.gradient.fill_(1.0)
    state.exp_avg_sq.fill_(0.5)
    assert (state.exp_avg_sq * 0.999 + 0.001 == 0.5).all()
    for updates in range(700):
        adamw_(state, make_update(updates, betas=betas), 0.0, number=0)
    # 1 − 0.5 · 0.999^700; steps of 2^-8 at random give the mean of 10,000 a deviation far below 0.002
    assert state.exp_avg_sq.double().mean().item() == pytest.approx(1 - 0.5 * 0.999**700, abs=2e-3)


@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
def test_found_inf_changes_nothing(moment_dtype: torch.dtype) -> None:
    state = make_state(torch.randn(5, 7), moment_dtype)
    run(state, [torch.randn(5, 7)] * 3, 1.0)
    before = [tensor.clone() for tensor in state]
    state.gradient[2] = math.nan
    adamw_(state, make_update(3, clip=math.nan, found_inf=True), DECAY, number=0)
    assert all(torch.equal(a, b) for a, b in zip(state[:2] + state[3:], before[:2] + before[3:], strict=True))
