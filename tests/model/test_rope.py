"""Rotary tables against transformers' YaRN and a float64 twin; what a rotation must keep."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oracles import FLOAT32, assert_near
from p828.config import RopeScaling
from p828.model.rope import apply_rotary, attention_factor, inverse_frequencies, rotary

# head_dim, theta, scaling
TABLES = [
    (64, 1e4, RopeScaling(factor=2.0)),
    (64, 1e4, RopeScaling(factor=4.0, original_max_position_embeddings=2048)),
    (64, 150000.0, RopeScaling(factor=32.0, original_max_position_embeddings=4096)),
    (128, 1e6, RopeScaling(factor=8.0, original_max_position_embeddings=32768, beta_fast=16.0, beta_slow=2.0)),
    (32, 1e4, RopeScaling(factor=1.5, original_max_position_embeddings=512)),
    (8, 1e4, RopeScaling(factor=40.0, original_max_position_embeddings=64)),  # the ramp starts before the first pair
    (4, 100.0, RopeScaling(factor=16.0, original_max_position_embeddings=100000)),  # it ends after the last
]


def formula_twin(head_dim: int, theta: float, scaling: RopeScaling) -> list[float]:
    """YaRN (arXiv 2309.00071), equations 17, 18 and 23, with the ramp over the pair's index as its authors wrote it."""

    def pair_that_turns(times: float) -> float:
        """The pair i with L · theta^(−2i/d) = 2π · times."""
        wavelengths = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return head_dim / 2 * math.log(wavelengths) / math.log(theta)

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    table = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        kept = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        table.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return table


@pytest.mark.parametrize("head_dim, theta, scaling", TABLES)
def test_inverse_frequencies_against_the_formula(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    expected = torch.tensor(formula_twin(head_dim, theta, scaling), dtype=torch.float64)
    # Frequency by frequency, as the slow ones turn least but over the longest distances. A float32 power with an
    # exponent up to ln(1e6) = 14 multiplies the exponent's rounding, 14 · 2^-24 = 8e-7.
    actual = inverse_frequencies(head_dim, theta, scaling)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("head_dim, theta, scaling", TABLES)
def test_inverse_frequencies_against_transformers(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    longest = int(scaling.factor * scaling.original_max_position_embeddings)
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=longest)
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(inverse_frequencies(head_dim, theta, scaling), expected, rtol=2e-6, atol=0)
    assert attention_factor(scaling.factor) == pytest.approx(expected_factor, rel=1e-15)


def test_factor_one_is_plain_rope() -> None:
    expected = [10000.0 ** (-i / 32) for i in range(32)]
    actual = inverse_frequencies(64, 10000.0, RopeScaling(factor=1.0))
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_attention_factor() -> None:
    assert attention_factor(1.0) == 1.0
    assert attention_factor(math.e) == pytest.approx(1.1)
    assert attention_factor(32.0) == pytest.approx(1.3465735902799727)  # gpt-oss


def test_tables_hold_cos_and_sin_times_the_attention_factor() -> None:
    frequencies = inverse_frequencies(16, 1e4, RopeScaling(factor=4.0))
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 100, 4095, 0]])
    cos, sin = rotary(positions, frequencies, 4.0)
    assert cos.shape == sin.shape == (2, 5, 1, 8)
    angles = positions[:, :, None, None].double() * frequencies.double()
    # The largest angle, 4095, carries half a unit in the last place of float32: 1.2e-4 rad.
    torch.testing.assert_close(cos.double(), (0.1 * math.log(4) + 1) * angles.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin.double(), (0.1 * math.log(4) + 1) * angles.sin(), rtol=0, atol=2e-4)


def test_rotation_against_complex_numbers() -> None:
    """The pair (i, i + D/2) is one complex number, turned by exp(1j · angle)."""
    x = torch.randn(2, 9, 3, 16)
    frequencies = inverse_frequencies(16, 1e4, RopeScaling())
    positions = torch.arange(9).expand(2, -1)
    turn = torch.polar(torch.ones(2, 9, 1, 8).double(), positions[:, :, None, None].double() * frequencies.double())
    expected = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
    assert_near(
        apply_rotary(x, *rotary(positions, frequencies, 1.0)), torch.cat((expected.real, expected.imag), -1), FLOAT32
    )


def test_rotation_keeps_norms() -> None:
    x = torch.randn(2, 33, 4, 64)
    positions = torch.randint(4096, (2, 33))
    turned = apply_rotary(x, *rotary(positions, inverse_frequencies(64, 1e4, RopeScaling()), 1.0))
    assert_near(turned.norm(dim=-1), x.norm(dim=-1), FLOAT32)
    assert (turned - x).norm() > 1


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_scores_depend_on_distance_alone(factor: float) -> None:
    frequencies = inverse_frequencies(32, 1e4, RopeScaling(factor=factor))
    q, k = torch.randn(2, 1, 1, 1, 32).unbind()

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rotary(x, *rotary(torch.tensor([[position]]), frequencies, factor))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum().item()

    # Angles up to 1000 rad carry 3e-5 rad of rounding, times the vectors' product near 32.
    assert score(17, 5) == pytest.approx(score(1012, 1000), abs=2e-3)
    assert score(5, 5) == pytest.approx((1 + 0.1 * math.log(factor)) ** 2 * (q * k).sum().item(), abs=1e-4)
    assert score(17, 5) != pytest.approx(score(18, 5), abs=1e-2)


def test_rotation_returns_the_dtype_it_was_given() -> None:
    angles = rotary(torch.arange(3)[None], inverse_frequencies(8, 1e4, RopeScaling()), 1.0)
    assert apply_rotary(torch.randn(1, 3, 2, 8, dtype=torch.bfloat16), *angles).dtype == torch.bfloat16
