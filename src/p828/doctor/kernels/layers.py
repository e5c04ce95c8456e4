"""The kernels of a layer: norms, attention with sinks, the router, routed and shared experts."""

import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from p828.config import ModelConfig, RopeScaling
from p828.doctor.kernels.comparison import FLOAT32, Comparison, Place, gradients
from p828.model.attention import Attention, AttentionMask
from p828.model.backend import attention_backend
from p828.model.experts import Experts, SharedExperts, activate
from p828.model.norm import ResidualNorm, RMSNorm
from p828.model.rope import inverse_frequencies, rotary
from p828.model.router import Router
from p828.model.transformer import document_bounds

M = TypeVar("M", bound=nn.Module)
EXPERTS, EMPTY = 5, 3  # routed experts, and the one that no token goes to
MODEL = ModelConfig(
    vocab_size=97, hidden_size=136, moe_intermediate_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    use_qk_norm=True, n_routed_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=256,
)  # fmt: skip
DOCUMENTS = [[1, 37, 64, 98], [172, 27, 1]]  # lengths, by sequence: single tokens, and past a tile of 64 and of 128


def norm(place: Place) -> list[Comparison]:
    """RMSNorm of the sum x + delta, and the sum; and RMSNorm alone."""
    x_TH, delta_TH, grad_sum_TH, grad_normed_TH = (place.randn(333, MODEL.hidden_size) for _ in range(4))
    twin = ResidualNorm(MODEL.hidden_size, 1e-5).double()
    _fill(twin, place)
    ours = _on_device(twin, place, torch.float32)
    leaves, twins = [place.leaf(x_TH), place.leaf(delta_TH)], [_twin(x_TH), _twin(delta_TH)]
    actual, expected = ours(*leaves), twin(*twins)
    torch.autograd.backward(actual, [place.leaf(grad_sum_TH), place.leaf(grad_normed_TH)])
    torch.autograd.backward(expected, [grad_sum_TH, grad_normed_TH])
    alone = RMSNorm.forward(ours, place.leaf(x_TH)), RMSNorm.forward(twin, x_TH)
    return [
        Comparison("norm alone", *alone, place.tolerance),
        Comparison("sum", actual[0], expected[0], place.tolerance),
        Comparison("norm", actual[1], expected[1], place.tolerance),
        *gradients(("input", "weight"), (leaves[0], ours.weight), (twins[0], twin.weight), place.tolerance),
    ]


def attention(place: Place) -> list[Comparison]:
    """A layer with norms of queries and keys, rotation, documents and sinks; the sinks' gradient is one of its own.

    Against the plain backend in float64. Two projections more than attention alone triple the tolerance.
    """
    documents_BS, positions_BS = _documents()
    twin = Attention(MODEL).double()
    _fill(twin, place)
    ours = _on_device(twin, place, torch.float32)
    angles = rotary(positions_BS, inverse_frequencies(MODEL.head_dim, MODEL.rope_theta, RopeScaling()), 1.0)
    x_BSH, upstream_BSH = (place.randn(*documents_BS.shape, MODEL.hidden_size) for _ in range(2))
    mask_BSC = (documents_BS[:, :, None] == documents_BS[:, None, :]).tril()
    backend = attention_backend(MODEL, place.device, place.dtype)
    if backend == "flash_triton":
        mask = AttentionMask(backend, None, *document_bounds(documents_BS.to(place.device)))
    else:
        mask = AttentionMask(backend, mask_BSC.to(place.device))
    our_x, twin_x = place.leaf(x_BSH), _twin(x_BSH)
    actual = ours(our_x, tuple(angle.to(place.device) for angle in angles), mask)
    expected = twin(twin_x, angles, AttentionMask("reference", mask_BSC))
    actual.backward(place.leaf(upstream_BSH))
    expected.backward(upstream_BSH)
    tolerance = 3 * place.tolerance
    names = ["input", "queries", "keys", "values", "sinks"]
    parameters = [(side.q_proj.weight, side.k_proj.weight, side.v_proj.weight, side.sinks) for side in (ours, twin)]
    return [
        Comparison("output", actual, expected, tolerance),
        *gradients(names, (our_x, *parameters[0]), (twin_x, *parameters[1]), tolerance),
    ]


def router(place: Place) -> list[Comparison]:
    """Logits in float32 whatever the layers compute in, and the choice by score plus bias."""
    config = replace(MODEL, hidden_size=256, n_routed_experts=48, num_experts_per_tok=6, n_group=6, topk_group=2)
    twin = Router(config).double()
    _fill(twin, place)
    twin.e_score_correction_bias.copy_(0.1 * place.randn(48))
    ours = _on_device(twin, place, torch.float32)
    x_TH, upstream_TK = place.randn(300, 256), place.randn(300, 6)
    our_x, twin_x = place.leaf(x_TH), _twin(x_TH)
    actual, expected = ours(our_x), twin(twin_x)
    actual.weights_TK.backward(upstream_TK.to(place.device, torch.float32))
    expected.weights_TK.backward(upstream_TK)
    # The logits' gradient has 16 bits in the weight's gradient, and normalised weights nearly cancel in it.
    return [
        Comparison("logits", actual.logits_TE, expected.logits_TE, FLOAT32),
        Comparison("experts", actual.experts_TK, expected.experts_TK, 0.0),
        Comparison("weights", actual.weights_TK, expected.weights_TK, FLOAT32),
        *gradients(("input",), (our_x,), (twin_x,), place.tolerance),
        *gradients(("weight",), (ours.weight,), (twin.weight,), 10 * FLOAT32),
    ]


def routed_experts(place: Place) -> list[Comparison]:
    """The mixture with an expert that gets no token, whose gradients are zero, against every expert for every token."""
    tokens = 257
    chosen_TK = torch.rand(tokens, EXPERTS - 1, generator=place.generator).argsort(1)[:, :2]
    experts_TK = chosen_TK + (chosen_TK >= EMPTY)
    twin = Experts(MODEL).double()
    _fill(twin, place)
    ours = _on_device(twin, place, place.dtype)
    x_TH, upstream_TH = place.randn(tokens, MODEL.hidden_size), place.randn(tokens, MODEL.hidden_size)
    weights_TK = place.randn(tokens, 2).abs()
    our_x, our_weights = place.leaf(x_TH), place.leaf(weights_TK, torch.float32)
    twin_x, twin_weights = _twin(x_TH), _twin(weights_TK)
    actual = ours(our_x, our_weights, ours.permutation(our_x, experts_TK.to(place.device), None))
    expected = _dense_experts(twin, twin_x, experts_TK, twin_weights)
    actual.backward(place.leaf(upstream_TH))
    expected.backward(upstream_TH)
    leaves = (our_x, our_weights, ours.gate_up_proj, ours.down_proj)
    twins = (twin_x, twin_weights, twin.gate_up_proj, twin.down_proj)
    (our_empty, twin_empty) = (
        None if w.grad is None else w.grad[EMPTY] for w in (ours.gate_up_proj, twin.gate_up_proj)
    )
    return [
        Comparison("output", actual, expected, 2 * place.tolerance),
        *gradients(("input", "weights", "gate and up", "down"), leaves, twins, 2 * place.tolerance),
        Comparison("the empty expert", our_empty, twin_empty, 0.0, is_gradient=True),
    ]


def shared_experts(place: Place) -> list[Comparison]:
    config = replace(MODEL, hidden_act="swiglu_of_product", n_shared_experts=2)
    twin = SharedExperts(config).double()
    _fill(twin, place)
    ours = _on_device(twin, place, place.dtype)
    x_TH, upstream_TH = place.randn(333, MODEL.hidden_size), place.randn(333, MODEL.hidden_size)
    our_x, twin_x = place.leaf(x_TH), _twin(x_TH)
    actual, expected = ours(our_x), twin(twin_x)
    actual.backward(place.leaf(upstream_TH))
    expected.backward(upstream_TH)
    names, leaves, twins = ["input"], [our_x], [twin_x]
    for name, parameter in twin.named_parameters():
        names.append(name.partition("_")[0])
        leaves.append(ours.get_parameter(name))
        twins.append(parameter)
    tolerance = 2 * place.tolerance
    return [Comparison("output", actual, expected, tolerance), *gradients(names, leaves, twins, tolerance)]


def _dense_experts(experts: Experts, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Every expert of every token, and then the weights, which are zero where it was not chosen: (T, H)."""
    gate_TEP, up_TEP = torch.einsum("th,eph->tep", x_TH, experts.gate_up_proj).chunk(2, dim=-1)
    out_TEH = torch.einsum("tei,ehi->teh", activate(experts.hidden_act, gate_TEP, up_TEP), experts.down_proj)
    weights_TE = torch.zeros(out_TEH.shape[:2], dtype=x_TH.dtype).scatter(1, experts_TK, weights_TK)
    return (out_TEH * weights_TE[..., None]).sum(1)


def _documents() -> tuple[Tensor, Tensor]:
    """Documents' ids and positions: (B, S) each."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS]
    return torch.stack(ids), torch.stack(positions)


def _twin(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def _fill(module: nn.Module, place: Place) -> None:
    """Random weights that keep activations at unit size, on the grid of the dtype."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(place.randn(*parameter.shape, scale=scale))


def _on_device(module: M, place: Place, dtype: torch.dtype) -> M:
    """A copy with parameters of `dtype`."""
    return copy.deepcopy(module).to(place.device, dtype)
