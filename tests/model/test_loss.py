"""The chunked loss against torch's cross-entropy in float64, values and gradients."""

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, FLOAT32, FLOAT64, assert_near, leaves, naive_loss
from p828.model.backend import LOSS_CHUNK_TOKENS, LOSS_COLUMNS
from p828.model.loss import IGNORE, linear_cross_entropy, loss_and_gradients

CHUNK = LOSS_CHUNK_TOKENS["cpu"]

VOCABULARY, HIDDEN, SCALE = 50, 8, -0.37


def make(tokens: int, ignored: float = 0.2, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(vocabulary, (tokens,))
    return (
        torch.randn(tokens, HIDDEN),
        torch.randn(vocabulary, HIDDEN),
        targets.where(torch.rand(tokens) >= ignored, IGNORE),
    )


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, dweight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss, dhidden and dweight, the latter from zero unless given."""
    if dweight is None:
        dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return *loss_and_gradients(hidden, weight, targets, torch.tensor(SCALE, dtype=dweight.dtype), dweight), dweight


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    twins = leaves(hidden, weight, dtype=torch.float64)
    loss = naive_loss(*twins, targets)
    (SCALE * loss).backward()
    return loss.detach(), twins[0].grad, twins[1].grad


def assert_all_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_values_and_gradients(dtype: torch.dtype, tokens: int) -> None:
    hidden, weight, targets = make(tokens, ignored=0.2 if tokens > 1 else 0.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    expected = oracle(hidden, weight, targets)
    assert_all_near(ours(hidden, weight, targets), expected, tolerance)
    assert_near(linear_cross_entropy(hidden, weight, targets), expected[0], tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 50, 64])
def test_logits_that_fill_up_a_row_change_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocabulary: int
) -> None:
    """As on a GPU; with hidden states so that theirs, of zero, would be the largest by far."""
    monkeypatch.setitem(LOSS_COLUMNS, "cpu", 16)
    hidden, weight, targets = make(CHUNK + 40, vocabulary=vocabulary)
    hidden, weight = (50 * hidden.abs()).to(dtype), -weight.abs().to(dtype)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    before = torch.randn_like(weight, dtype=sum_dtype)
    loss, dhidden, dweight = ours(hidden, weight, targets, before.clone())
    assert (loss.dtype, dhidden.shape, dweight.shape) == (sum_dtype, hidden.shape, weight.shape)
    monkeypatch.setitem(LOSS_COLUMNS, "cpu", 1)
    unfilled = ours(hidden, weight, targets, before.clone())
    assert torch.equal(dhidden, unfilled[1]) or dtype != torch.bfloat16
    if dtype != torch.bfloat16:  # whose logits of some hundreds are whole numbers
        expected = oracle(hidden, weight, targets)
        tolerance = FLOAT64 if dtype == torch.float64 else 1e-4
        assert_all_near((loss, dhidden, dweight - before), expected, tolerance)
    assert_all_near((loss, dhidden, dweight), unfilled, FLOAT64 if dtype == torch.float64 else 1e-4)


def test_the_weights_gradient_is_added_to_what_is_there() -> None:
    hidden, weight, targets = make(30)
    before = torch.randn_like(weight)
    _, _, dweight = ours(hidden, weight, targets, before.clone())
    assert_near(dweight, before + oracle(hidden, weight, targets)[2], FLOAT32)


def test_all_targets_ignored() -> None:
    hidden, weight, _ = make(5)
    targets = torch.full((5,), IGNORE)
    loss, dhidden, dweight = ours(hidden, weight, targets)
    assert loss.item() == linear_cross_entropy(hidden, weight, targets).item() == 0
    assert torch.equal(dhidden, torch.zeros_like(dhidden))
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = make(20)
    hidden = 100 * hidden
    # Logits near 500 carry 500 · 2^-24 = 3e-5 each; differences of them, sums of some of them.
    assert_all_near(ours(hidden, weight, targets), oracle(hidden, weight, targets), 1e-4)


def test_bfloat16_gives_a_float32_loss_and_weight_gradient() -> None:
    hidden, weight, targets = make(300)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    actual = ours(hidden, weight, targets)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.float32]
    assert_all_near(actual, oracle(hidden, weight, targets), BFLOAT16)


def test_the_twin_is_differentiable() -> None:
    hidden, weight, targets = make(CHUNK + 5)
    twins = leaves(hidden, weight, dtype=torch.float64)
    (SCALE * linear_cross_entropy(*twins, targets)).backward()
    _, dhidden, dweight = oracle(hidden, weight, targets)
    assert_near(twins[0].grad, dhidden, FLOAT64)
    assert_near(twins[1].grad, dweight, FLOAT64)
