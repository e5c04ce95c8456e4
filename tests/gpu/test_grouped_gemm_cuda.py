"""The grouped product in bfloat16 against one product per expert in float64, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, assert_near, leaves
from p828.kernels.moe.grouped_gemm_cpu import grouped_linear, grouped_linear_loop, grouped_mm

LOADS = {
    "even": [16, 16, 16, 16],
    "ragged": [1, 37, 7, 130],
    "middle empty": [5, 0, 0, 20],
    "outer empty": [0, 9, 8, 0],
    "all on the first": [33, 0, 0, 0],
    "all on the last": [0, 0, 0, 33],
    "one row": [0, 1, 0, 0],
}


@pytest.mark.parametrize("function", [grouped_mm, grouped_linear])
@pytest.mark.parametrize("loads", LOADS)
def test_against_float64(cuda: torch.device, loads: str, function: Callable[..., Tensor]) -> None:
    loads_E = torch.tensor(LOADS[loads])
    rows = int(loads_E.sum())
    x, weight, upstream = (t.bfloat16() for t in (torch.randn(rows, 64), torch.randn(4, 48, 64), torch.randn(rows, 48)))
    twins = leaves(x, weight, dtype=torch.float64)
    expected = grouped_linear_loop(*twins, loads_E)
    expected.backward(upstream.double())
    ours = leaves(x, weight, dtype=torch.bfloat16, device=cuda)
    actual = function(*ours, loads_E.to(cuda))
    actual.backward(upstream.to(cuda))
    # Products accumulate in float32 and round once, by 2^-9 at most.
    assert_near(actual, expected, BFLOAT16)
    for our, twin in zip(ours, twins, strict=True):
        assert_near(our.grad, twin.grad, BFLOAT16)
    empty = (loads_E == 0).to(cuda)
    assert torch.equal(ours[1].grad[empty], torch.zeros_like(ours[1].grad[empty]))
