"""The loss kernel and the head around it against float64."""

import pytest
import torch
import torch.nn.functional as F

from oracles import BFLOAT16, FLOAT32, assert_near, leaves, naive_loss
from p828.kernels.cross_entropy import softmax_gradient_
from p828.model.backend import LOSS_CHUNK_TOKENS
from p828.model.loss import IGNORE, loss_and_gradients

CHUNK = LOSS_CHUNK_TOKENS["cuda"]

SCALE = 0.37


def oracle(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of SCALE times their sum, in float64."""
    logits = logits.double().cpu().requires_grad_()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    (gradient,) = torch.autograd.grad(SCALE * losses.sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("vocabulary", [2, 3, 97, 1024, 4097, 16384, 20000, 49152, 49153])
@pytest.mark.parametrize("size", [3.0, 1e4])
def test_kernel(cuda: torch.device, dtype: torch.dtype, tolerance: float, vocabulary: int, size: float) -> None:
    logits, targets = (size * torch.randn(20, vocabulary)).to(cuda, dtype), torch.randint(vocabulary, (20,))
    targets[::5] = IGNORE
    targets[1] = logits[1].argmax()
    losses, gradient = oracle(logits, targets)
    actual = softmax_gradient_(logits, targets.to(cuda), torch.tensor(SCALE, device=cuda))
    assert_near(actual, losses, FLOAT32)
    assert_near(logits, gradient, tolerance)
    assert torch.equal(logits[::5], torch.zeros_like(logits[::5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary, width", [(1, 64), (97, 128), (16384, 16448), (50257, 50304)])
def test_kernel_on_rows_that_are_filled_up(cuda: torch.device, dtype: torch.dtype, vocabulary: int, width: int) -> None:
    filled, targets = (3 * torch.randn(20, width)).to(cuda, dtype), torch.randint(vocabulary, (20,)).to(cuda)
    targets[::5] = IGNORE
    logits, scale = filled[:, :vocabulary].contiguous(), torch.tensor(SCALE, device=cuda)
    losses, gradient = oracle(logits, targets.cpu())
    filled[:, vocabulary:] = 1e4
    assert_near(softmax_gradient_(filled, targets, scale, vocabulary), losses, FLOAT32)
    assert_near(filled[:, :vocabulary], gradient, FLOAT32 if dtype == torch.float32 else BFLOAT16)
    assert torch.equal(filled[:, vocabulary:], torch.zeros_like(filled[:, vocabulary:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 300, CHUNK, CHUNK + 100])
@pytest.mark.parametrize("vocabulary", [1003, 1024, 50])
def test_loss_and_gradients(cuda: torch.device, dtype: torch.dtype, tokens: int, vocabulary: int) -> None:
    """Full and shorter chunks, targets left out, a vocabulary that is no multiple of anything, twice the same bits."""
    hidden, weight = torch.randn(tokens, 64).to(cuda, dtype), torch.randn(vocabulary, 64).to(cuda, dtype)
    targets = torch.randint(vocabulary, (tokens,)).where(torch.rand(tokens) < 0.9, IGNORE)
    before, scale = torch.randn(vocabulary, 64, device=cuda), torch.tensor(SCALE, device=cuda)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            dweight = before.clone()
            runs.append((*loss_and_gradients(hidden, weight, targets.to(cuda), scale, dweight), dweight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))

    twins = leaves(hidden, weight, dtype=torch.float64)
    expected = naive_loss(*twins, targets)
    (SCALE * expected).backward()
    loss, dhidden, dweight = runs[0]
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, dtype, torch.float32)
    # bfloat16 logits near 30 carry 0.06: errors of single probabilities of some percent, averaged over 1,000 entries.
    tolerance = 10 * FLOAT32 if dtype == torch.float32 else 3 * BFLOAT16
    assert_near(loss, expected, tolerance)
    assert_near(dhidden, twins[0].grad, tolerance)
    assert_near(dweight, before.double().cpu() + twins[1].grad, tolerance)
