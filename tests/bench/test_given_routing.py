"""Routings given from outside: their loads, and that weights and gradients stay the router's."""

import pytest
import torch

from p828.bench.routing import GivenRouter, balanced_experts, random_experts
from p828.bench.step import OwnStep
from p828.config import Config, TrainConfig
from p828.model.router import Router
from tiny import tiny_config

SHAPES = [(64, 8, 3), (50, 8, 3), (7, 4, 4), (5, 1, 1), (3, 48, 6)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("tokens, experts, per_token", SHAPES)
def test_forced_balance(tokens: int, experts: int, per_token: int) -> None:
    chosen_TK = balanced_experts(tokens, experts, per_token, generator())
    loads = torch.bincount(chosen_TK.flatten(), minlength=experts)
    assert loads.sum() == tokens * per_token
    assert loads.max() - loads.min() <= 1
    assert all(len(set(row)) == per_token for row in chosen_TK.tolist())


@pytest.mark.parametrize("tokens, experts, per_token", SHAPES)
def test_random_draws_without_replacement(tokens: int, experts: int, per_token: int) -> None:
    chosen_TK = random_experts(tokens, experts, per_token, generator())
    assert chosen_TK.shape == (tokens, per_token)
    assert all(len(set(row)) == per_token and set(row) <= set(range(experts)) for row in chosen_TK.tolist())


def test_random_draws_every_set_equally_often() -> None:
    tokens, experts = 6000, 4
    sets = random_experts(tokens, experts, 2, generator()).sort(dim=-1).values
    counts = torch.bincount(sets[:, 0] * experts + sets[:, 1], minlength=16)
    counts = counts[counts > 0]
    assert len(counts) == 6
    # A binomial of 6,000 with 1/6: mean 1,000, standard deviation 29; five of them.
    assert (counts - tokens / 6).abs().max() < 5 * 29


def test_a_given_router_keeps_the_weights_and_their_gradients() -> None:
    config = tiny_config()
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    chosen_TK = balanced_experts(10, config.n_routed_experts, config.num_experts_per_tok, generator())
    given = GivenRouter(router, chosen_TK)
    x_TH = torch.randn(10, config.hidden_size)
    routing = given(x_TH)
    assert torch.equal(routing.experts_TK, chosen_TK)
    assert torch.equal(routing.weights_TK, router(x_TH).weights_TK)
    routing.weights_TK.square().sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().sum() > 0
    given.e_score_correction_bias += 1  # the balance moves the bias of the router it stands in for
    assert torch.equal(router.e_score_correction_bias, torch.ones(config.n_routed_experts))


def test_the_engine_counts_the_forced_loads() -> None:
    train = TrainConfig(micro_batch_size=2, gradient_accumulation=3, device="cpu")
    config = Config(model=tiny_config(), train=train)
    length, model = 16, config.model
    config = Config(model=model, train=train, data=type(config.data)(sequence_length=length))
    step = OwnStep(config, "balanced")
    for _ in range(3):
        batch = next(step.batches)
        step.engine.forward_backward(batch, batch.num_targets)
    result = step.engine.step(1e-3)
    each = 3 * 2 * length * model.num_experts_per_tok // model.n_routed_experts
    assert result.applied
    assert result.loads == [[each] * model.n_routed_experts] * model.num_hidden_layers
