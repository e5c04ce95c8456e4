"""The embedding's gradient against float64 sums in Python's order."""

import pytest
import torch

from oracles import FLOAT32, FLOAT64, assert_near
from p828.kernels.embedding import add_embedding_gradient_


def oracle(before: torch.Tensor, tokens: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    result = before.double()
    for token, row in zip(tokens.tolist(), dx.double(), strict=True):
        result[token] += row
    return result


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.bfloat16, FLOAT32)])
@pytest.mark.parametrize(
    "tokens", [torch.tensor([3]), torch.zeros(30, dtype=torch.int64), torch.arange(50) * 7 % 9], ids=len
)
def test_adds_to_what_is_there(dtype: torch.dtype, tolerance: float, tokens: torch.Tensor) -> None:
    before, dx = torch.randn(11, 6), torch.randn(len(tokens), 6).to(dtype)
    after = before.clone()
    add_embedding_gradient_(after, tokens, dx)
    assert_near(after, oracle(before, tokens, dx), tolerance)  # bfloat16 rows are exact in float32
    absent = [token for token in range(11) if token not in tokens.tolist()]
    assert torch.equal(after[absent], before[absent])


def test_float64() -> None:
    before, tokens, dx = torch.randn(5, 3).double(), torch.randint(5, (20,)), torch.randn(20, 3).double()
    after = before.clone()
    add_embedding_gradient_(after, tokens, dx)
    assert_near(after, oracle(before, tokens, dx), FLOAT64)
