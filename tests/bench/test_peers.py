"""Other libraries' models as peers: their sizes are p828's, and they train."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from p828.bench.systems import System, common_to_all, describe_changes
from p828.config import Config, DataConfig, TrainConfig
from p828.model.costs import count_parameters
from tiny import tiny_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers.step import PeerStep
from peers.systems import has_liger, peer_systems


def tiny_run(**model: object) -> Config:
    train = TrainConfig(micro_batch_size=2, gradient_accumulation=2, device="cpu")
    return Config(model=tiny_config(**model), data=DataConfig(sequence_length=16), train=train)


@pytest.mark.parametrize("routing", ["model", "balanced"])
def test_transformers(routing: str) -> None:
    config = tiny_run(attention_sinks=False, use_qk_norm=True)
    step = PeerStep(System("peer", "transformers", config), routing)
    assert sum(parameter.numel() for parameter in step.model.parameters()) == count_parameters(config.model).total
    assert falls(step)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torchtitan", "triton"))), reason="torchtitan and triton are not installed"
)
@pytest.mark.parametrize("routing", ["model", "balanced"])
@pytest.mark.parametrize("options", [{}, {"has_float32_weights": True}])
def test_torchtitan(routing: str, options: dict[str, bool]) -> None:
    config = tiny_run(attention_sinks=False, use_qk_norm=True, n_shared_experts=1)
    step = PeerStep(System("peer", "torchtitan", config, {**options, "is_compiled": False}), routing)
    assert sum(parameter.numel() for parameter in step.model.parameters()) == count_parameters(config.model).total
    assert falls(step)


def falls(step: PeerStep) -> bool:
    """Whether a few steps lower the loss of a batch."""
    batch = next(step.batches)

    def loss() -> float:
        value = step.peer.forward_backward(batch.tokens_BS, batch.targets_BS, step.num_targets).item()
        step.optimizer.zero_grad()
        return value

    before = loss()
    for _ in range(4):
        step.run()
    return loss() < before


def test_a_step_takes_the_mean_over_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PeerStep(System("peer", "transformers", tiny_run()), "model")
    head = step.model.lm_head.weight
    batches = [next(step.batches) for _ in range(4)]  # all there are: the same come again
    losses = [step.model(batch.tokens_BS, labels=None).logits for batch in batches[:2]]
    expected = sum(
        torch.autograd.grad(cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten()), head)[0] / 2
        for logits, batch in zip(losses, batches, strict=False)
    )
    found = []
    # What the update is about to see; clipping comes after.
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm, foreach: found.append(head.grad.clone())
    )
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
    step.peer.forward_backward(batch.tokens_BS, batch.targets_BS, step.num_targets)
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
    assert {system.options["experts"] for system in on_cpu} == {"eager", "grouped_mm"}
    assert [(system.framework, system.options) for system in on_gpu] == [
        ("transformers", {}),
        ("transformers", {"is_compiled": True}),
        *[("transformers", {"is_compiled": True, "has_liger_head": True})] * has_liger(),
        ("torchtitan", {}),
        ("torchtitan", {"has_float32_weights": True}),
    ]
