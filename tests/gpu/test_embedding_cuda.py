"""The embedding's gradient kernel against float64, and twice the same bits."""

import pytest
import torch

from oracles import FLOAT32, assert_near
from p828.kernels.embedding import add_embedding_gradient_, add_embedding_gradient_plain_

TOKENS = {
    "one": torch.tensor([3]),
    "all the same": torch.full((3000,), 7),
    "few": torch.arange(5000) * 31 % 11,
    "many": torch.arange(4096) * 7919 % 1000,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [8, 24, 512, 600, 1024])
@pytest.mark.parametrize("name", TOKENS)
def test_adds_to_what_is_there(cuda: torch.device, dtype: torch.dtype, hidden: int, name: str) -> None:
    tokens = TOKENS[name]
    before, dx = torch.randn(1000, hidden), torch.randn(len(tokens), hidden).to(dtype)
    expected = before.double()
    add_embedding_gradient_plain_(expected, tokens, dx)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [before.to(cuda, copy=True) for _ in range(2)]
        for after in runs:
            add_embedding_gradient_(after, tokens.to(cuda), dx.to(cuda))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)
    assert_near(runs[0], expected, FLOAT32)
    absent = torch.ones(1000, dtype=torch.bool).index_fill(0, tokens, False)
    assert torch.equal(runs[0].cpu()[absent], before[absent])
