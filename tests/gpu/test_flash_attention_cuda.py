"""Flash attention with sinks and documents in bfloat16 against float64, values and gradients.

Inputs are rounded to bfloat16 before either side sees them. What is left are the kernel's own roundings: the
probabilities and the output forward, and the scores' gradients backward, each 2^-9 = 2e-3 at most and independent
from term to term. `BFLOAT16` = 1e-2 of the norm holds their sum; a missing or mistaken term is of order one.
"""

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, assert_near, leaves, naive_attention
from p828.model.attention import Visibility, attend, reference_attention
from p828.model.transformer import cumulative_lengths
from tiny import make_documents

HEADS, HEAD_DIM = 4, 64
SINKS = torch.tensor([8.0, -8.0, 1.5, 0.0])
ROWS = {
    "one document": [[128], [128]],
    "several": [[1, 37, 64, 26], [100, 27, 1]],
    "one-token": [[1] * 128, [1] * 64 + [64]],
    "ragged": [[33], [33]],
    "one token": [[1], [1]],
}


def make_inputs(batch: int, length: int, key_heads: int) -> list[Tensor]:
    """q, k, v and the output's gradient, on the grid of bfloat16."""
    return [torch.randn(batch, length, n, HEAD_DIM).bfloat16() for n in (HEADS, key_heads, key_heads, HEADS)]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_against_float64(cuda: torch.device, key_heads: int, rows: str, sinks: Tensor | None) -> None:
    documents, positions = make_documents(ROWS[rows])
    q, k, v, upstream = make_inputs(*documents.shape, key_heads)
    twins = leaves(q, k, v, sinks, dtype=torch.float64)
    expected = naive_attention(*twins, documents)
    expected.backward(upstream.double())

    ours = leaves(q, k, v, dtype=torch.bfloat16, device=cuda)
    ours += leaves(sinks, dtype=torch.float32, device=cuda)
    mask_BSC = (documents[:, :, None] == documents[:, None, :]).tril()
    visibility = Visibility("flash", mask_BSC.to(cuda), cumulative_lengths(positions).to(cuda))
    actual = attend(*ours, visibility)
    assert actual.dtype == torch.bfloat16
    actual.backward(upstream.to(cuda))

    assert_near(actual, expected, BFLOAT16)
    for our, twin in zip(ours, twins, strict=True):
        if twin is not None:
            assert_near(our.grad, twin.grad, BFLOAT16)
    if sinks is not None:
        # Head by head: a sum over tokens of unit-size dot products with 2^-9 each, scaled by the sink's probability.
        # The absolute part is for the sink of −8, whose probability is e^-8 = 3e-4 over the number of keys.
        size = twins[3].grad.abs().max().item()
        torch.testing.assert_close(ours[3].grad.cpu().double(), twins[3].grad, rtol=0.03, atol=0.03 * max(size, 1e-3))


def test_long_rows(cuda: torch.device) -> None:
    """Many blocks of the kernel, documents across their borders; the plain backend in float64 is the oracle here."""
    documents, positions = make_documents([[700, 1, 323], [1024]])
    q, k, v, upstream = make_inputs(*documents.shape, 2)
    mask_BSC = (documents[:, :, None] == documents[:, None, :]).tril().to(cuda)
    twins = leaves(q, k, v, SINKS, dtype=torch.float64, device=cuda)
    expected = reference_attention(*twins, mask_BSC)
    expected.backward(upstream.to(cuda).double())
    ours = leaves(q, k, v, dtype=torch.bfloat16, device=cuda) + leaves(SINKS, dtype=torch.float32, device=cuda)
    actual = attend(*ours, Visibility("flash", mask_BSC, cumulative_lengths(positions).to(cuda)))
    actual.backward(upstream.to(cuda))
    assert_near(actual, expected, BFLOAT16)
    for our, twin in zip(ours, twins, strict=True):
        assert_near(our.grad, twin.grad, BFLOAT16)


def test_reference_backend_in_bfloat16(cuda: torch.device) -> None:
    q, k, v, upstream = make_inputs(2, 33, 2)
    twins = leaves(q, k, v, SINKS, dtype=torch.float64)
    expected = naive_attention(*twins, torch.zeros(2, 33))
    expected.backward(upstream.double())
    ours = leaves(q, k, v, dtype=torch.bfloat16, device=cuda) + leaves(SINKS, dtype=torch.float32, device=cuda)
    actual = attend(*ours, Visibility("reference", None, None))
    actual.backward(upstream.to(cuda))
    # The scores too are rounded to bfloat16 before the softmax, which the fused kernel keeps in float32.
    assert_near(actual, expected, 2 * BFLOAT16)
    for our, twin in zip(ours, twins, strict=True):
        assert_near(our.grad, twin.grad, 2 * BFLOAT16)
