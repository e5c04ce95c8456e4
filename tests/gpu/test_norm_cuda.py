"""Sum and normalisation in one pass, in bfloat16 against float64, values and gradients."""

import pytest
import torch

from oracles import BFLOAT16, assert_near, leaves
from p828.model.norm import ResidualNorm, RMSNorm


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 50, 64), (1, 333, 1000), (2, 600, 5000)], ids=str)
def test_against_float64(cuda: torch.device, shape: tuple[int, ...]) -> None:
    x, delta, grad_total, grad_normed = torch.randn(4, *shape).bfloat16()
    norm, twin = ResidualNorm(shape[-1], 1e-5), ResidualNorm(shape[-1], 1e-5).double()
    norm.weight.data.normal_()
    twin.load_state_dict(norm.state_dict())
    twins = leaves(x, delta, dtype=torch.float64)
    expected = twin(*twins)
    torch.autograd.backward(expected, (grad_total.double(), grad_normed.double()))
    norm.to(cuda)
    ours = leaves(x, delta, dtype=torch.bfloat16, device=cuda)
    actual = norm(*ours)
    torch.autograd.backward(actual, (grad_total.to(cuda), grad_normed.to(cuda)))
    gradients = [
        (leaf.grad, theirs.grad) for leaf, theirs in zip((*ours, norm.weight), (*twins, twin.weight), strict=True)
    ]
    for our, theirs in [*zip(actual, expected, strict=True), *gradients]:
        # The sum is rounded to bfloat16 before it is normalised, 2^-9 of each element.
        assert_near(our, theirs, BFLOAT16)
    assert ours[0].grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 50, 64), (2, 600, 5000)], ids=str)
def test_alone_against_float64(cuda: torch.device, shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape).bfloat16()
    norm, twin = RMSNorm(shape[-1], 1e-5), RMSNorm(shape[-1], 1e-5).double()
    norm.weight.data.normal_()
    twin.load_state_dict(norm.state_dict())
    norm.to(cuda)
    (ours,), (theirs,) = leaves(x, dtype=torch.bfloat16, device=cuda), leaves(x, dtype=torch.float64)
    actual, expected = norm(ours), twin(theirs)
    actual.backward(grad.to(cuda))
    expected.backward(grad.double())
    assert_near(actual, expected, BFLOAT16)
    assert_near(ours.grad, theirs.grad, BFLOAT16)
    assert_near(norm.weight.grad, twin.weight.grad, BFLOAT16)


def test_repeats_bit_for_bit(cuda: torch.device) -> None:
    norm = ResidualNorm(512, 1e-5).to(cuda)
    x, delta, grad = torch.randn(3, 5000, 512, device=cuda).bfloat16()

    def once() -> list[torch.Tensor]:
        norm.weight.grad = None
        inputs = leaves(x, delta, dtype=torch.bfloat16, device=cuda)
        total, normed = norm(*inputs)
        torch.autograd.backward((total, normed), (grad, grad))
        return [total, normed, inputs[0].grad, norm.weight.grad]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)
