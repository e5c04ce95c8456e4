"""The Triton attention with sinks and documents in bfloat16 against float64, values and gradients.

Inputs are rounded to bfloat16 before either side sees them. What is left are the kernels' own roundings: the
probabilities and the output forward; backward the probabilities, the scores' gradients, the output that delta is made
from, and the result; each 2^-9 = 2e-3 at most and independent from term to term. `BFLOAT16` = 1e-2 of the norm holds
their sum; a missing or mistaken term is of order one.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, assert_near, leaves
from p828.config import RopeScaling
from p828.kernels.attention.ops import attention
from p828.model.attention import Attention, AttentionMask, reference_attention
from p828.model.rope import inverse_frequencies, rotary
from p828.model.transformer import document_bounds
from tiny import make_documents, tiny_config

ROWS = {
    "one document": [[200], [200]],
    "several": [[1, 37, 64, 98], [172, 27, 1]],
    "one-token": [[1] * 150, [1] * 64 + [86]],
    "ragged": [[33], [33]],
    "one token": [[1], [1]],
    "long": [[1500, 1, 547], [2048], [300] * 6 + [248]],
}


class Inputs(NamedTuple):
    """On the grid of bfloat16, in bfloat16, on the GPU; q, k and v are slices of one tensor."""

    q_BSND: Tensor
    k_BSGD: Tensor
    v_BSGD: Tensor
    sinks_N: Tensor | None
    upstream_BSND: Tensor
    document_start_T: Tensor
    document_end_T: Tensor
    mask_BSS: Tensor


def make_inputs(
    device: torch.device, rows: list[list[int]], heads: int, key_heads: int, head_dim: int, with_sinks: bool
) -> Inputs:
    documents_BS, positions_BS = make_documents(rows)
    batch, length = documents_BS.shape
    qkv = torch.randn(batch, length, heads + 2 * key_heads, head_dim).to(device, torch.bfloat16)
    lengths = torch.tensor([n for row in rows for n in row])
    document_start_T = torch.arange(batch * length) - positions_BS.flatten()
    document_end_T = torch.repeat_interleave(lengths.cumsum(0), lengths)
    # Between a sink that takes almost all the weight and one that takes almost none.
    sinks_N = torch.linspace(8.0, -4.0, heads) if with_sinks else None
    return Inputs(
        *qkv.split((heads, key_heads, key_heads), dim=2),
        None if sinks_N is None else sinks_N.to(device),
        torch.randn(batch, length, heads, head_dim).to(device, torch.bfloat16),
        document_start_T.to(device, torch.int32),
        document_end_T.to(device, torch.int32),
        (documents_BS[:, :, None] == documents_BS[:, None, :]).tril().to(device),
    )


def ours(inputs: Inputs) -> list[Tensor]:
    """The output, and the gradients of q, k, v and, if there are any, the sinks; without norms, rotated by nothing."""
    qkv_TXD = torch.cat(inputs[:3], dim=2).flatten(0, 1).requires_grad_()
    sinks = None if inputs.sinks_N is None else inputs.sinks_N.clone().requires_grad_()
    out_TND, _ = attention(*arguments_of(inputs, qkv_TXD, sinks))
    assert out_TND.dtype == torch.bfloat16
    out_TND.backward(inputs.upstream_BSND.flatten(0, 1))
    grads = qkv_TXD.grad.split([x.shape[2] for x in inputs[:3]], dim=1)
    return [out_TND.detach(), *grads, *(() if sinks is None else (sinks.grad,))]


def arguments_of(inputs: Inputs, qkv_TXD: Tensor, sinks_N: Tensor | None, batch: int | None = None) -> tuple:
    cos = torch.ones(len(qkv_TXD), qkv_TXD.shape[2] // 2, device=qkv_TXD.device)
    heads, batch = inputs.q_BSND.shape[2], len(inputs.q_BSND) if batch is None else batch
    bounds = inputs.document_start_T, inputs.document_end_T
    return qkv_TXD, None, None, cos, 0 * cos, sinks_N, *bounds, heads, batch, 1e-5


def check(inputs: Inputs) -> None:
    q, k, v, sinks = leaves(*inputs[:4], dtype=torch.float64, device=inputs.q_BSND.device)
    expected = reference_attention(q, k, v, sinks, inputs.mask_BSS)
    expected.backward(inputs.upstream_BSND.double())
    actual = ours(inputs)
    # A document's first token sees itself and the sink: its score's gradient is P (1 − P) dO·v, found as the difference
    # of dO·v and of delta, which carries the output's rounding: 8 · 2^-9 for dO·v of size 8, times keys of norm 8.
    tolerance = BFLOAT16 if len(inputs.document_start_T) > 2 else 5 * BFLOAT16
    for our, twin in zip(actual[:4], (expected, q.grad, k.grad, v.grad), strict=True):
        assert_near(our, twin.flatten(0, 1), tolerance)
    if sinks is not None:
        # Head by head: a sum over tokens of unit-size dot products with 2^-9 each, scaled by the sink's probability.
        # The absolute part is for the low sinks, whose probability and with it their gradient is next to nothing.
        size = max(sinks.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(actual[4].double(), sinks.grad, rtol=0.03, atol=0.03 * size)


@pytest.mark.parametrize("head_dim", [16, 64, 96])
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
def test_norms_and_rotation(cuda: torch.device, head_dim: int, with_norms: bool) -> None:
    """The layer with its kernels against itself in float64 without."""
    documents_BS, positions_BS = make_documents(ROWS["several"])
    layer, twin = (Attention(tiny_config(hidden_size=64, head_dim=head_dim, use_qk_norm=with_norms)) for _ in range(2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.2)
        parameter.data = parameter.data.bfloat16().float()
    twin.load_state_dict(layer.state_dict())
    angles = rotary(positions_BS, inverse_frequencies(head_dim, 10_000.0, RopeScaling()), 1.0)
    x, upstream = torch.randn(2, *documents_BS.shape, 64).bfloat16()
    twin.double()
    (theirs,) = leaves(x, dtype=torch.float64)
    mask_BSC = (documents_BS[:, :, None] == documents_BS[:, None, :]).tril()
    expected = twin(theirs, angles, AttentionMask("reference", mask_BSC))
    expected.backward(upstream.double())
    layer.to(cuda)
    (our,) = leaves(x, dtype=torch.bfloat16, device=cuda)
    bounds = (bound.to(cuda) for bound in document_bounds(documents_BS))
    actual = layer(our, tuple(angle.to(cuda) for angle in angles), AttentionMask("flash_triton", None, *bounds))
    actual.backward(upstream.to(cuda))
    # Two projections more than attention alone, and softmax over scores of size ten.
    assert_near(actual, expected, 3 * BFLOAT16)
    assert_near(our.grad, theirs.grad, 3 * BFLOAT16)
    for name, parameter in layer.named_parameters():
        assert_near(parameter.grad, twin.get_parameter(name).grad, 3 * BFLOAT16)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_against_float64(cuda: torch.device, key_heads: int, rows: str, with_sinks: bool) -> None:
    check(make_inputs(cuda, ROWS[rows], 4, key_heads, 64, with_sinks))


@pytest.mark.parametrize("head_dim", [8, 16, 32, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [2, 6, 8], ids=["1 a key head", "3 a key head", "4 a key head"])
@pytest.mark.parametrize("tiles", ["own", "small"])
def test_head_sizes(cuda: torch.device, monkeypatch: pytest.MonkeyPatch, heads: int, head_dim: int, tiles: str) -> None:
    if tiles == "small":  # what GPUs without the tensor memory accelerator run
        from p828.kernels.attention import flash_triton as attention_triton

        monkeypatch.setattr(attention_triton, "uses_tma", lambda device: False)
    check(make_inputs(cuda, [[500, 77], [77, 500]], heads, 2, head_dim, True))


def test_strided_inputs(cuda: torch.device) -> None:
    inputs = make_inputs(cuda, ROWS["several"], 4, 2, 64, True)
    qkv_TXD = torch.cat(inputs[:3], dim=2).flatten(0, 1)
    strided_TXD = qkv_TXD.transpose(0, 1).contiguous().transpose(0, 1)
    expected, actual = (attention(*arguments_of(inputs, x, inputs.sinks_N))[0] for x in (qkv_TXD, strided_TXD))
    assert torch.equal(actual, expected)


def test_large_scores(cuda: torch.device) -> None:
    """Scores near 1e3, whose exponential float32 cannot hold; their own rounding, 1e3 · 2^-24, is 6e-5."""
    inputs = make_inputs(cuda, ROWS["several"], 4, 2, 64, True)
    inputs = inputs._replace(q_BSND=inputs.q_BSND * 256)
    expected = reference_attention(*(x.double() for x in inputs[:4] if x is not None), inputs.mask_BSS)
    assert_near(ours(inputs)[0], expected.flatten(0, 1), BFLOAT16)


def test_repeats_bit_for_bit(cuda: torch.device) -> None:
    inputs = make_inputs(cuda, ROWS["long"], 8, 2, 64, True)
    first = ours(inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, ours(inputs)))


def test_order_of_rows_changes_nothing(cuda: torch.device) -> None:
    """`batch` says in which order blocks are worked on; any number gives the same bits."""
    inputs = make_inputs(cuda, ROWS["several"], 4, 2, 64, True)
    qkv_TXD = torch.cat(inputs[:3], dim=2).flatten(0, 1)
    expected = attention(*arguments_of(inputs, qkv_TXD, inputs.sinks_N))[0]
    for batch in (1, 3, 7):
        assert torch.equal(attention(*arguments_of(inputs, qkv_TXD, inputs.sinks_N, batch))[0], expected)


def test_registration(cuda: torch.device) -> None:
    """Schema, fake tensors and autograd are what `torch.compile` expects."""
    inputs = make_inputs(cuda, ROWS["several"], 4, 2, 64, True)
    qkv_TXD = torch.cat(inputs[:3], dim=2).flatten(0, 1).requires_grad_()
    arguments = arguments_of(inputs, qkv_TXD, inputs.sinks_N.requires_grad_())
    torch.library.opcheck(
        attention, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
