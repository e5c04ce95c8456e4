"""The sink's algebra around a fused kernel, on the CPU's kernel. Documents and heads: tests/model/test_attention.py."""

import math

import pytest
import torch

from oracles import FLOAT32, FLOAT64, assert_near, leaves
from p828.kernels.attention.flash_cpu import FlashAttentionCPU


def test_equal_scores_have_an_analytic_answer() -> None:
    """With q = 0 query s gives each of s + 1 keys the weight 1 / (s + 1 + exp(sink))."""
    sink, length = 0.7, 6
    v = torch.ones(1, 1, length, 4)
    out = FlashAttentionCPU.apply(torch.zeros(1, 1, length, 4), v, v, torch.tensor([sink]), None)
    expected = torch.tensor([(s + 1) / (s + 1 + math.exp(sink)) for s in range(length)])
    assert_near(out[0, 0], expected[:, None].expand(-1, 4), FLOAT32)


def test_sink_gradient_has_an_analytic_value() -> None:
    """d/dsink of (s + 1) / (s + 1 + e^sink) is −(s + 1) e^sink / (s + 1 + e^sink)²."""
    sink = torch.tensor([0.7], requires_grad=True)
    v = torch.ones(1, 1, 6, 4)
    FlashAttentionCPU.apply(torch.zeros(1, 1, 6, 4), v, v, sink, None)[..., 0].sum().backward()
    e = math.exp(0.7)
    assert sink.grad is not None
    assert sink.grad.item() == pytest.approx(sum(-s * e / (s + e) ** 2 for s in range(1, 7)), rel=1e-5)


def test_later_queries_alone_are_those_of_all() -> None:
    """The last 4 of 9, with the mask that a causal one has there, and gradients of a loss that only they are in."""
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    whole = leaves(q, k, v, dtype=torch.float64)
    later = leaves(q[:, :, 5:], k, v, dtype=torch.float64)
    is_hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None, 5:]
    mask = torch.zeros(is_hidden.shape, dtype=torch.float64).masked_fill(is_hidden, -math.inf)
    sinks = torch.randn(2, dtype=torch.float64)
    expected = FlashAttentionCPU.apply(*whole, sinks, None)[:, :, 5:]
    found = FlashAttentionCPU.apply(*later, sinks, mask)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert_near(found, expected, FLOAT64)
    assert_near(later[0].grad, whole[0].grad[:, :, 5:], FLOAT64)
    assert_near(later[1].grad, whole[1].grad, FLOAT64)
    assert_near(later[2].grad, whole[2].grad, FLOAT64)


@pytest.mark.parametrize("sink", [-1e4, -100.0])
def test_a_sink_far_below_the_scores_changes_nothing(sink: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    with_sink, without = (leaves(q, k, v, dtype=torch.float32) for _ in range(2))
    sinks = torch.full((2,), sink, requires_grad=True)
    FlashAttentionCPU.apply(*with_sink, sinks, None).square().sum().backward()
    FlashAttentionCPU.apply(*without, None, None).square().sum().backward()
    for a, b in zip(with_sink, without, strict=True):
        assert torch.equal(a.grad, b.grad)
    assert sinks.grad.abs().max() < 1e-40  # exp(−100) is 4e-44


def test_a_sink_far_above_the_scores_takes_everything() -> None:
    q, k, v = leaves(*torch.randn(3, 1, 2, 9, 8).unbind(), dtype=torch.float32)
    sinks = torch.full((2,), 1e4, requires_grad=True)
    out = FlashAttentionCPU.apply(q, k, v, sinks, None)
    out.sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad, sinks.grad):
        assert torch.equal(tensor, torch.zeros_like(tensor))
