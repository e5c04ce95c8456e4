"""transformers' model as a peer: its sizes are p828's, and it trains. torchtitan computes on a GPU only."""

import pytest
import torch

from p828.bench.step import PeerStep
from p828.bench.systems import System, common_to_all, describe_changes, has_liger, peer_systems
from p828.config import Config, DataConfig, TrainConfig
from p828.model.costs import count_parameters
from tiny import tiny_config


def tiny_run(**model: object) -> Config:
    train = TrainConfig(micro_batch_size=2, gradient_accumulation=2, device="cpu")
    return Config(model=tiny_config(**model), data=DataConfig(sequence_length=16), train=train)


@pytest.mark.parametrize("routing", ["model", "balanced"])
def test_transformers(routing: str) -> None:
    config = tiny_run(attention_sinks=False, use_qk_norm=True)
    step = PeerStep(System("peer", "transformers", config), routing)
    assert sum(parameter.numel() for parameter in step.model.parameters()) == count_parameters(config.model).total
    batch = step.batches.__next__()
    before = step.loss(batch.tokens_BS, batch.targets_BS).item()
    for _ in range(4):
        step.run()
    assert step.loss(batch.tokens_BS, batch.targets_BS).item() < before


def test_a_step_takes_the_mean_over_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PeerStep(System("peer", "transformers", tiny_run()), "model")
    head = step.model.lm_head.weight
    batches = [next(step.batches) for _ in range(4)]  # all there are: the same come again
    expected = sum(
        torch.autograd.grad(step.loss(batch.tokens_BS, batch.targets_BS), head)[0] / 2 for batch in batches[:2]
    )
    found = []
    # What the update is about to see; clipping comes after.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: found.append(head.grad.clone()))
    step.run()
    torch.testing.assert_close(found[0], expected)


def test_a_forced_routing_reaches_the_experts() -> None:
    """All tokens to the last two experts: the others get no gradient."""
    config = tiny_run()
    step = PeerStep(System("peer", "transformers", config), "balanced")
    experts = config.model.n_routed_experts
    for layer in step.model.model.layers:
        layer.mlp.experts.experts_TK.copy_(layer.mlp.experts.experts_TK.clamp_min(experts - 2))
    batch = next(step.batches)
    step.loss(batch.tokens_BS, batch.targets_BS).backward()
    grad = step.model.model.layers[0].mlp.experts.experts.down_proj.grad
    assert grad[: experts - 2].abs().sum() == 0
    assert grad[experts - 2 :].abs().sum() > 0


def test_everyone_computes_the_same() -> None:
    config = tiny_run(hidden_act="swiglu_of_product", dropout=0.1)
    common = common_to_all(config)
    assert describe_changes(config, common) == [
        "model.hidden_act = 'swiglu' (the shape's is 'swiglu_of_product')",
        "model.dropout = 0.0 (the shape's is 0.1)",
    ]
    assert describe_changes(common, common) == []


def test_which_systems_run_where() -> None:
    config = tiny_run()
    on_cpu = peer_systems(config, ("transformers",), "cpu")
    on_gpu = peer_systems(config, ("transformers", "torchtitan"), "cuda")
    assert {system.experts for system in on_cpu} == {"eager", "grouped_mm"}
    assert not any(system.is_compiled for system in on_cpu)
    assert [(system.framework, system.is_compiled, system.has_float32_weights) for system in on_gpu] == [
        ("transformers", False, False), ("transformers", True, False), *[("transformers", True, False)] * has_liger(),
        ("torchtitan", True, False), ("torchtitan", True, True),
    ]  # fmt: skip
    assert sum(system.has_liger_head for system in on_gpu) == has_liger()
