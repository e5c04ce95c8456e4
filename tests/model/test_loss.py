"""The chunked loss against torch's cross-entropy in float64, values and gradients."""

import pytest
import torch

from oracles import BFLOAT16, FLOAT32, FLOAT64, assert_near, leaves, naive_loss
from p828.model.loss import CHUNK_TOKENS, IGNORE, linear_cross_entropy
from tiny import tiny_model

VOCABULARY, HIDDEN = 50, 8


def make(tokens: int, ignored: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.randint(VOCABULARY, (tokens,))
    return (
        torch.randn(tokens, HIDDEN),
        torch.randn(VOCABULARY, HIDDEN),
        targets.where(torch.rand(tokens) >= ignored, IGNORE),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_values_and_gradients(dtype: torch.dtype, tokens: int, upstream: float) -> None:
    hidden, weight, targets = make(tokens, ignored=0.2 if tokens > 1 else 0.0)
    ours, twins = leaves(hidden, weight, dtype=dtype), leaves(hidden, weight, dtype=torch.float64)
    actual, expected = linear_cross_entropy(*ours, targets), naive_loss(*twins, targets)
    (upstream * actual).backward()
    (upstream * expected).backward()
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    for a, e in ((actual, expected), *((our.grad, twin.grad) for our, twin in zip(ours, twins, strict=True))):
        assert_near(a, e, tolerance)


def test_without_gradient_it_is_the_same_number() -> None:
    hidden, weight, targets = make(CHUNK_TOKENS + 5)
    with_gradient = linear_cross_entropy(*leaves(hidden, weight, dtype=torch.float32), targets)
    assert torch.equal(with_gradient, linear_cross_entropy(hidden, weight, targets))
    with torch.no_grad():
        assert torch.equal(with_gradient, linear_cross_entropy(hidden.requires_grad_(), weight, targets))


def test_gradient_for_one_argument_only() -> None:
    hidden, weight, targets = make(9)
    both = leaves(hidden, weight, dtype=torch.float64)
    naive_loss(*both, targets).backward()
    alone_hidden, alone_weight = leaves(hidden, weight, dtype=torch.float64)
    linear_cross_entropy(alone_hidden, weight.double(), targets).backward()
    linear_cross_entropy(hidden.double(), alone_weight, targets).backward()
    assert_near(alone_hidden.grad, both[0].grad, FLOAT64)
    assert_near(alone_weight.grad, both[1].grad, FLOAT64)


def test_all_targets_ignored() -> None:
    hidden, weight, _ = make(5)
    ours = leaves(hidden, weight, dtype=torch.float32)
    loss = linear_cross_entropy(*ours, torch.full((5,), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in ours)


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = make(20)
    ours, twins = leaves(100 * hidden, weight, dtype=torch.float32), leaves(100 * hidden, weight, dtype=torch.float64)
    actual, expected = linear_cross_entropy(*ours, targets), naive_loss(*twins, targets)
    actual.backward()
    expected.backward()
    # Logits near 500 carry 500 · 2^-24 = 3e-5 each; differences of them, sums of some of them.
    assert_near(actual, expected, 1e-4)
    assert_near(ours[0].grad, twins[0].grad, 1e-4)
    assert_near(ours[1].grad, twins[1].grad, 1e-4)


def test_bfloat16_hidden_gives_a_float32_loss_and_weight_gradient() -> None:
    hidden, weight, targets = make(300)
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()  # leave the inputs' own rounding out
    our_hidden, our_weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(our_hidden, our_weight, targets)
    loss.backward()
    assert (loss.dtype, our_hidden.grad.dtype, our_weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    twins = leaves(hidden, weight, dtype=torch.float64)
    expected = naive_loss(*twins, targets)
    expected.backward()
    assert_near(loss, expected, BFLOAT16)
    assert_near(our_hidden.grad, twins[0].grad, BFLOAT16)
    assert_near(our_weight.grad, twins[1].grad, BFLOAT16)


@pytest.mark.parametrize("tied", [False, True])
def test_through_the_whole_model(tied: bool) -> None:
    """With tied embeddings the embedding's gradient is the sum of both uses."""
    model = tiny_model(tie_word_embeddings=tied, attention_backend="reference")
    tokens, targets = torch.randint(97, (2, 7)), torch.randint(97, (14,))

    hidden = model(tokens).hidden_BSH.flatten(0, 1)
    linear_cross_entropy(hidden, model.head_weight, targets).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    hidden = model(tokens).hidden_BSH.flatten(0, 1)
    torch.nn.functional.cross_entropy(model.logits(hidden), targets, reduction="sum").backward()
    assert ("lm_head.weight" in ours) != tied
    for name, parameter in model.named_parameters():
        # The same model before the head; only rounding in the head differs, passed back through two layers.
        assert_near(ours[name], parameter.grad, 1e-5)
