"""Losses and logits' gradient, made in place, against torch's cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from oracles import BFLOAT16, FLOAT32, FLOAT64, assert_near
from p828.kernels.cross_entropy import softmax_gradient_

SCALE = 0.37


def oracle(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of SCALE times their sum, in float64."""
    logits = logits.detach().to(torch.float64, copy=True).requires_grad_()
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(SCALE * losses.sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
@pytest.mark.parametrize("vocabulary", [2, 97, 1000])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, vocabulary: int) -> None:
    logits, targets = (3 * torch.randn(40, vocabulary)).to(dtype), torch.randint(vocabulary, (40,))
    targets[::5] = -100
    losses, gradient = oracle(logits, targets)
    actual = softmax_gradient_(logits, targets, torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32)))
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The losses are float32 sums even for bfloat16 logits; only the gradient is rounded to it.
    assert_near(actual, losses, min(tolerance, FLOAT32))
    assert_near(logits, gradient, tolerance)
    assert torch.equal(logits[::5], torch.zeros_like(logits[::5]))
    assert torch.equal(actual[::5], torch.zeros_like(actual[::5]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_fills_up_a_row_is_left_out_and_zero(dtype: torch.dtype) -> None:
    logits, targets = (3 * torch.randn(20, 64)).to(dtype), torch.randint(50, (20,))
    filled = logits.clone()
    filled[:, 50:] = 1e4
    scale = torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32))
    logits = logits[:, :50].contiguous()
    assert torch.equal(softmax_gradient_(filled, targets, scale, 50), softmax_gradient_(logits, targets, scale))
    assert torch.equal(filled[:, :50], logits)
    assert torch.equal(filled[:, 50:], torch.zeros_like(filled[:, 50:]))


def test_all_targets_ignored() -> None:
    logits = torch.randn(3, 7)
    assert torch.equal(softmax_gradient_(logits, torch.full((3,), -100), torch.tensor(SCALE)), torch.zeros(3))
    assert torch.equal(logits, torch.zeros(3, 7))


def test_extreme_logits() -> None:
    """Exponents over- and underflow; differences from the maximum do not matter any more where they underflow."""
    logits, targets = 1e4 * torch.randn(20, 50), torch.randint(50, (20,))
    targets[:5] = logits[:5].argmax(1)  # losses of zero
    losses, gradient = oracle(logits, targets)
    actual = softmax_gradient_(logits, targets, torch.tensor(SCALE))
    assert_near(actual, losses, FLOAT32)
    assert_near(logits, gradient, FLOAT32)
