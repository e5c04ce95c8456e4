"""One linear layer per expert against one matrix-vector product per row in float64."""

import pytest
import torch

from oracles import FLOAT32, FLOAT64, assert_near, leaves
from p828.kernels.moe.grouped_gemm_cpu import grouped_linear, grouped_linear_loop

LOADS = {
    "even": [2, 2, 2, 2],
    "ragged": [1, 5, 0, 3],
    "outer empty": [0, 4, 1, 0],
    "all on one": [0, 0, 7, 0],
    "one row": [0, 1, 0, 0],
}


@pytest.mark.parametrize("function", [grouped_linear, grouped_linear_loop])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loads", LOADS)
def test_values_and_gradients(function, dtype: torch.dtype, loads: str) -> None:
    loads_E = torch.tensor(LOADS[loads])
    rows = int(loads_E.sum())
    x, weight, upstream = torch.randn(rows, 6), torch.randn(4, 5, 6), torch.randn(rows, 5)
    ours, twins = leaves(x, weight, dtype=dtype), leaves(x, weight, dtype=torch.float64)

    actual = function(*ours, loads_E)
    actual.backward(upstream.to(dtype))
    expert_of_row = [e for e, load in enumerate(LOADS[loads]) for _ in range(load)]
    expected = torch.stack([twins[1][e] @ twins[0][r] for r, e in enumerate(expert_of_row)])
    expected.backward(upstream.double())

    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_near(actual, expected, tolerance)
    for our, twin in zip(ours, twins, strict=True):
        assert_near(our.grad, twin.grad, tolerance)


def test_by_finite_differences() -> None:
    inputs = leaves(torch.randn(5, 3), torch.randn(3, 2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, torch.tensor([2, 0, 3])), inputs)
