"""RMSNorm against its formula in float64."""

import pytest
import torch

from oracles import FLOAT32, FLOAT64, assert_near, leaves
from p828.model.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # at 1e-4 eps dominates the mean square
def test_values_and_gradients(dtype: torch.dtype, scale: float) -> None:
    eps = 1e-5
    norm = RMSNorm(16, eps).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, upstream = scale * torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    (ours,) = leaves(x, dtype=dtype)
    twin, weight = leaves(x, norm.weight, dtype=torch.float64)
    actual, expected = norm(ours), twin / (twin.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    actual.backward(upstream.to(dtype))
    expected.backward(upstream.double())
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_near(actual, expected, tolerance)
    assert_near(ours.grad, twin.grad, tolerance)
    assert_near(norm.weight.grad, weight.grad, tolerance)
