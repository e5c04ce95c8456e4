"""Attention with sinks against a float64 twin of one query at a time, values and gradients."""

import pytest
import torch
from torch import Tensor

from oracles import FLOAT32, FLOAT64, assert_near, leaves, naive_attention
from p828.model.attention import Attention, AttentionMask, attend
from p828.model.rope import inverse_frequencies, rotary
from tiny import tiny_config, tiny_model

HEADS, HEAD_DIM = 4, 8
SINKS = torch.tensor([8.0, -8.0, 0.5, 0.0])  # one that takes almost all the weight, one almost none
DOCUMENTS = {
    "one": [[0] * 9, [0] * 9],
    "several": [[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]],
    "one-token": [[0, 1, 2, 2, 3, 4, 5, 5, 6], list(range(9))],
    "padded": [[0, 0, 0, 0, 1, 1, -1, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1, -1]],
}
ARITHMETIC = [("reference", torch.float64), ("reference", torch.float32), ("flash_cpu", torch.float32)]


def check(
    backend: str, dtype: torch.dtype, key_heads: int, sinks: Tensor | None, documents_BS: Tensor, mask: bool
) -> None:
    batch, length = documents_BS.shape
    q, k, v = (torch.randn(batch, length, n, HEAD_DIM) for n in (HEADS, key_heads, key_heads))
    upstream = torch.randn(batch, length, HEADS, HEAD_DIM)

    twins = leaves(q, k, v, sinks, dtype=torch.float64)
    expected = naive_attention(*twins, documents_BS)
    expected.backward(upstream.double())

    ours = leaves(q, k, v, sinks, dtype=dtype)
    mask_BSC = (documents_BS[:, :, None] == documents_BS[:, None, :]).tril() if mask else None
    actual = attend(*ours, AttentionMask(backend, mask_BSC, None))
    assert actual.dtype == dtype
    actual.backward(upstream.to(dtype))

    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_near(actual, expected, tolerance)
    for our, twin in zip(ours[:3], twins[:3], strict=True):
        assert_near(our.grad, twin.grad, tolerance)
    if sinks is not None:
        # Head by head: the sink of −8 gets a gradient e^8 times smaller than the others, lost in a norm. It is a sum
        # of terms near 1e-3 with errors of 2^-24 each relative to the unit-size dot products they come from.
        relative = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(ours[3].grad.double(), twins[3].grad, rtol=relative, atol=1e-3 * tolerance)


@pytest.mark.parametrize("backend, dtype", ARITHMETIC)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_causal_attention(backend: str, dtype: torch.dtype, key_heads: int, length: int, sinks: Tensor | None) -> None:
    check(backend, dtype, key_heads, sinks, torch.zeros(2, length, dtype=torch.int64), mask=False)


@pytest.mark.parametrize("backend, dtype", ARITHMETIC)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_document_masking(backend: str, dtype: torch.dtype, documents: str, sinks: Tensor | None) -> None:
    check(backend, dtype, 2, sinks, torch.tensor(DOCUMENTS[documents]), mask=True)


def test_scores_that_overflow_a_plain_exponential() -> None:
    """Scores near 1e3, whose exponential float32 cannot hold; their own rounding, 1e3 · 2^-24, is 6e-5."""
    q, k, v = torch.randn(3, 1, 5, HEADS, HEAD_DIM).unbind()
    expected = naive_attention(300 * q.double(), k.double(), v.double(), SINKS.double(), torch.zeros(1, 5))
    for backend in ("reference", "flash_cpu"):
        assert_near(attend(300 * q, k, v, SINKS, AttentionMask(backend, None, None)), expected, 3e-4)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_gradients_by_finite_differences(sinks: Tensor | None) -> None:
    inputs = leaves(
        torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4), sinks, dtype=torch.float64
    )
    mask_BSC = torch.tensor([[0, 0, 1, 1, 1]]).mT.eq(torch.tensor([0, 0, 1, 1, 1])).tril()[None]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, AttentionMask("reference", mask_BSC, None)), inputs)


@pytest.mark.parametrize("backend", ["reference", "flash_cpu"])
def test_repeats_bit_for_bit(backend: str) -> None:
    q, k, v = torch.randn(2, 33, 4, 8), torch.randn(2, 33, 2, 8), torch.randn(2, 33, 2, 8)

    def once() -> list[Tensor]:
        inputs = leaves(q, k, v, SINKS, dtype=torch.float32)
        out = attend(*inputs, AttentionMask(backend, None, None))
        out.square().sum().backward()
        return [out, *(x.grad for x in inputs)]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("use_qk_norm", [False, True])
@pytest.mark.parametrize("backend", ["reference", "flash_cpu"])
def test_attention_layer(use_qk_norm: bool, backend: str) -> None:
    """Projections, norm on each head, rotation and output projection around the naive attention."""
    config = tiny_config(use_qk_norm=use_qk_norm)
    layer = Attention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    x = torch.randn(2, 6, config.hidden_size)
    positions = torch.arange(6).expand(2, -1)
    angles = rotary(positions, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), 1.0)
    actual = layer(x, angles, AttentionMask(backend, None, None))

    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    half = config.head_dim // 2

    def head(name: str, b: int, s: int, n: int) -> Tensor:
        rows = slice(n * config.head_dim, (n + 1) * config.head_dim)
        y = weights[f"{name}_proj.weight"][rows] @ x[b, s].double()
        if name == "v":
            return y
        if use_qk_norm:
            y = y / (y.square().mean() + config.rms_norm_eps).sqrt() * weights[f"{name}_norm.weight"]
        angle = torch.tensor([s * config.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        first, second = y[:half], y[half:]
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))

    def heads(name: str, count: int) -> Tensor:
        all_heads = [head(name, b, s, n) for b in range(2) for s in range(6) for n in range(count)]
        return torch.stack(all_heads).view(2, 6, count, config.head_dim)

    attended = naive_attention(heads("q", 4), heads("k", 2), heads("v", 2), weights["sinks"], torch.zeros(2, 6))
    assert_near(actual, attended.flatten(2) @ weights["o_proj.weight"].T, FLOAT32)


@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_masked_documents_equal_each_alone(backend: str) -> None:
    """The whole model: documents packed in one row give what each gives alone, positions from 0."""
    model = tiny_model(attention_backend=backend)
    lengths = [5, 1, 9, 1]
    tokens = torch.randint(97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(tokens, positions, documents).hidden_BSH
        alone = torch.cat([model(part).hidden_BSH for part in tokens.split(lengths, dim=1)], dim=1)
    # Two layers of float32 parts, each amplifying the one before: a few times FLOAT32.
    assert_near(packed, alone, 1e-5)


def test_unmasked_documents_see_each_other() -> None:
    model = tiny_model(mask_documents=False)
    tokens, documents = torch.randint(97, (1, 8)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        together = model(tokens, None, documents).hidden_BSH
        assert torch.equal(together, model(tokens).hidden_BSH)
        changed = model(torch.cat((tokens[:, :1] + 1, tokens[:, 1:]), 1) % 97, None, documents).hidden_BSH
    assert (together[:, 4:] - changed[:, 4:]).abs().max() > 1e-3
