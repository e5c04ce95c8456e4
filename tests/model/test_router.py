"""The router against a twin of one token at a time, its gradient, and the losses and loads made of its choice."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oracles import FLOAT32, FLOAT64, assert_near, naive_routing
from p828.model.router import Router, Routing, sequence_balance_loss, z_loss
from tiny import tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "softmax": {"scoring_func": "softmax"},
    "unnormalised": {"norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups, softmax, raw": {
        "n_group": 2,
        "topk_group": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.5,
    },
    "one expert": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "all groups": {"n_group": 4, "topk_group": 4},
}


def make_router(dtype: torch.dtype = torch.float64, **changes: Any) -> Router:
    router = Router(tiny_config(**changes)).to(dtype)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(std=0.3)
    return router


@pytest.mark.parametrize("variant", VARIANTS)
def test_choice_and_weights(variant: str) -> None:
    router = make_router(**VARIANTS[variant])
    x = torch.randn(50, router.config.hidden_size, dtype=torch.float64)
    routing = router(x)
    logits = x @ router.weight.T
    torch.testing.assert_close(routing.logits_TE, logits)
    for t in range(len(x)):
        expected = naive_routing(router.config, logits[t].tolist(), router.e_score_correction_bias.tolist())
        chosen = dict(zip(routing.experts_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True))
        assert chosen == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_the_router_weight(variant: str) -> None:
    """Given the choice, weights are plain functions of the logits; float64 autograd through those is the oracle."""
    router = make_router(torch.float32, **VARIANTS[variant])
    config = router.config
    x = torch.randn(40, config.hidden_size, requires_grad=True)
    routing = router(x)
    upstream = torch.randn_like(routing.weights_TK)
    routing.weights_TK.backward(upstream)

    weight, x_twin = router.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    logits = x_twin @ weight.T
    scores = 1 / (1 + (-logits).exp()) if config.scoring_func == "sigmoid" else logits.exp() / logits.exp().sum(1, True)
    rows = []
    for t, chosen in enumerate(routing.experts_TK.tolist()):
        chosen_scores = scores[t, chosen]
        rows.append(chosen_scores / chosen_scores.sum() if config.norm_topk_prob else chosen_scores)
    (torch.stack(rows) * config.routed_scaling_factor).backward(upstream.double())
    assert_near(router.weight.grad, weight.grad, FLOAT32)
    assert_near(x.grad, x_twin.grad, FLOAT32)


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    router = make_router(norm_topk_prob=False)
    x = torch.randn(50, router.config.hidden_size, dtype=torch.float64)
    router.e_score_correction_bias.zero_()
    before = router(x)
    router.e_score_correction_bias[5] = 10.0
    after = router(x)
    assert not (before.experts_TK == 5).any(1).all()
    assert (after.experts_TK == 5).any(1).all()
    assert torch.equal(after.weights_TK, after.scores_TE.gather(1, after.experts_TK))
    assert torch.equal(before.scores_TE, after.scores_TE)


def test_bias_gets_no_gradient() -> None:
    router = make_router(torch.float32)
    router.e_score_correction_bias.requires_grad_()
    router(torch.randn(9, 32)).weights_TK.square().sum().backward()
    assert router.e_score_correction_bias.grad is None
    assert router.weight.grad is not None
    assert "e_score_correction_bias" in router.state_dict()


def test_computes_in_float32_for_bfloat16_input() -> None:
    router = make_router(torch.float32)
    x = torch.randn(20, 32).bfloat16()
    routing = router(x)
    assert (routing.weights_TK.dtype, routing.logits_TE.dtype) == (torch.float32, torch.float32)
    assert_near(routing.logits_TE, x.double() @ router.weight.double().T, FLOAT32)


def test_scores_that_underflow_give_finite_weights_and_gradients() -> None:
    """sigmoid(−200) is zero in float32; a token that no expert wants is weighed by zeros, not by 0 / 0."""
    router = make_router(torch.float32)
    router.weight.data.fill_(-200 / 32)
    routing = router(torch.ones(1, 32))
    routing.weights_TK.sum().backward()
    assert routing.weights_TK.isfinite().all()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def test_against_transformers() -> None:
    glm = pytest.importorskip("transformers.models.glm4_moe.modeling_glm4_moe")
    config = tiny_config(n_group=4, topk_group=2, routed_scaling_factor=2.5)
    theirs_config = glm.Glm4MoeConfig(**{name: getattr(config, name) for name in SHARED_NAMES})
    theirs, ours = glm.Glm4MoeTopkRouter(theirs_config), make_router(torch.float32, **dataclasses.asdict(config))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, config.hidden_size)
    outputs = theirs(x)
    if not isinstance(outputs, tuple):
        pytest.skip("this version's router returns logits alone; test_equal_logits.py compares the whole model")
    _, their_weights, their_experts = outputs
    routing = ours(x)
    order_ours, order_theirs = routing.experts_TK.argsort(1), their_experts.argsort(1)
    assert torch.equal(routing.experts_TK.gather(1, order_ours), their_experts.gather(1, order_theirs))
    assert_near(routing.weights_TK.gather(1, order_ours), their_weights.gather(1, order_theirs), FLOAT32)


SHARED_NAMES = (
    "hidden_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("valid_of_rows", [None, (7, 7, 7), (7, 1, 0), (0, 0, 0), (3, 5, 2)])
def test_sequence_balance_loss(scoring_func: str, valid_of_rows: tuple[int, ...] | None) -> None:
    """DeepSeek-V3's equations 17 to 20 in loops, as a sum over the rows' valid tokens, values and gradient."""
    router = make_router(scoring_func=scoring_func)
    rows, length, experts, per_token = 3, 7, 8, 3
    x = torch.randn(rows * length, 32, dtype=torch.float64)
    routing = router(x)
    counts = valid_of_rows or (length,) * rows
    places = [row * length + torch.randperm(length)[:count] for row, count in enumerate(counts)]
    valid = torch.zeros(rows * length, dtype=torch.bool)
    valid[torch.cat(places)] = True
    actual = sequence_balance_loss(routing, rows, None if valid_of_rows is None else valid)
    (gradient,) = torch.autograd.grad(actual, router.weight)

    weight = router.weight.detach().requires_grad_()
    scores = (x @ weight.T).sigmoid() if scoring_func == "sigmoid" else F.softmax(x @ weight.T, dim=-1)
    expected = 0.0 * weight.sum()
    for tokens in (place.tolist() for place in places if len(place)):
        for e in range(experts):
            chose = sum(e in routing.experts_TK[t].tolist() for t in tokens)
            share = sum(scores[t, e] / scores[t].sum() for t in tokens) / len(tokens)
            expected = expected + experts / (per_token * len(tokens)) * chose * share * len(tokens)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert_near(actual, expected, FLOAT64)
    assert_near(gradient, expected_gradient, FLOAT64)


def test_sequence_balance_loss_is_one_a_token_when_even() -> None:
    scores = torch.full((8, 4), 0.5)
    experts = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    assert sequence_balance_loss(Routing(experts, scores[:, :2], scores, scores), 2).item() == pytest.approx(8.0)


@pytest.mark.parametrize("valid", [None, range(11), (0, 3, 10), ()])
def test_z_loss(valid: Sequence[int] | None) -> None:
    router = make_router()
    x = torch.randn(11, 32, dtype=torch.float64)
    valid_T = None if valid is None else torch.tensor([t in valid for t in range(11)])
    actual = z_loss(router(x), valid_T)
    (gradient,) = torch.autograd.grad(actual, router.weight)
    weight = router.weight.detach().requires_grad_()
    tokens = range(11) if valid is None else valid
    expected = sum(((x[t] @ weight.T).exp().sum().log() ** 2 for t in tokens), 0.0 * weight.sum())
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert_near(actual, expected, FLOAT64)
    assert_near(gradient, expected_gradient, FLOAT64)
