"""Initial weights: their spread, what is zero or one, and that a seed says it all."""

import math

import pytest
import torch

from p828.model.init import initialise, initialise_slice
from p828.model.transformer import Transformer
from tiny import tiny_config


def make(seed: int = 0) -> Transformer:
    model = Transformer(tiny_config(hidden_size=64, num_hidden_layers=3, use_qk_norm=True, n_shared_experts=2))
    initialise(model, seed)
    return model


def expected_std(name: str) -> float:
    if name.endswith("mlp.gate.weight"):
        return 0.002
    if "o_proj" in name or "down_proj" in name:
        return 0.02 / math.sqrt(2 * 3)
    return 0.02


def test_standard_deviations() -> None:
    checked = 0
    for name, parameter in make().named_parameters():
        if parameter.dim() == 1:
            continue
        # The deviation of n draws is off by 1 / sqrt(2n), their mean by std / sqrt(n): five of those.
        n = parameter.numel()
        assert parameter.std().item() == pytest.approx(expected_std(name), rel=5 / math.sqrt(2 * n)), name
        assert abs(parameter.mean().item()) < 5 * expected_std(name) / math.sqrt(n), name
        checked += 1
    assert checked == 2 + 3 * (4 + 1 + 2 + 3)


def test_normal_and_not_clipped() -> None:
    weight = make().model.embed_tokens.weight / 0.02
    share_beyond_two = (weight.abs() > 2).double().mean().item()
    assert share_beyond_two == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / weight.numel()))


def test_zeros_and_ones() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            value = 0.0 if name.endswith("sinks") else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, value)), name
    for layer in model.model.layers:
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, torch.zeros(8))


def test_every_expert_and_layer_differs() -> None:
    first, second, *_ = make().model.layers
    assert not torch.equal(first.mlp.experts.gate_up_proj, second.mlp.experts.gate_up_proj)
    assert not torch.equal(first.mlp.experts.gate_up_proj[0], first.mlp.experts.gate_up_proj[1])
    gate, up = first.mlp.experts.gate_up_proj.chunk(2, dim=1)
    assert not torch.equal(gate, up)


def test_same_seed_same_bits_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = make(seed=7).state_dict()
    torch.manual_seed(2)
    second = make(seed=7).state_dict()
    third = make(seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_initial_loss_is_near_that_of_a_uniform_guess() -> None:
    """Small weights mean nearly equal logits: ln(vocabulary), within the spread that 0.02 · sqrt(hidden) gives."""
    model = make()
    tokens = torch.randint(97, (4, 32))
    logits = model.logits(model(tokens).hidden_BSH)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(97, (128,)))
    assert loss.item() == pytest.approx(math.log(97), abs=0.1)


def test_a_slice_is_that_part_of_the_parameter() -> None:
    """What ranks rely on that each hold a part of every parameter."""
    model = make(seed=3)
    for name, parameter in model.named_parameters():
        start, end = parameter.numel() // 3, parameter.numel() // 2
        values = torch.empty(end - start)
        initialise_slice(values, name, model.config, 3, start)
        assert torch.equal(values, parameter.detach().flatten()[start:end]), name


def test_a_parameter_keeps_its_values_beside_others() -> None:
    """So that two models which differ in one part begin alike in the rest."""
    plain, other = Transformer(tiny_config()), Transformer(tiny_config(use_qk_norm=True, n_shared_experts=1))
    initialise(plain, 0)
    initialise(other, 0)
    values = other.state_dict()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, values[name]), name
