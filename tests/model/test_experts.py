"""The mixture against a loop over tokens and experts in float64, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import FLOAT32, FLOAT64, assert_near, leaves, naive_activation, naive_experts
from p828.model.costs import projected_width
from p828.model.experts import (
    Experts,
    PermuteTokens,
    SharedExperts,
    TokenPermutation,
    UnpermuteTokens,
    activate,
    sort_by_expert,
)
from tiny import tiny_config

EXPERTS = 5
CHOICES: dict[str, list[list[int]]] = {
    "every expert used": [[0, 1], [2, 4], [3, 0], [4, 1], [1, 2], [2, 3], [0, 4]],
    "one empty": [[0, 1], [4, 3], [3, 0], [1, 4]],
    "first and last empty": [[1, 2], [3, 1], [2, 3]],
    "all on one": [[2]] * 6,
    "all on the last": [[4]] * 3,
    "one token": [[3, 1]],
    "one token, one expert": [[0]],
    "K = E": [[4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [1, 0, 3, 2, 4]],
}


def make_experts(dtype: torch.dtype, hidden_act: str = "swiglu", **changes: Any) -> Experts:
    config = tiny_config(
        hidden_act=hidden_act, n_routed_experts=EXPERTS, hidden_size=12, moe_intermediate_size=10, **changes
    )
    experts = Experts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return experts


def run(experts: Experts, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return experts(x_TH, weights_TK, experts.permutation(x_TH, experts_TK, None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
@pytest.mark.parametrize("choice", CHOICES)
def test_values_and_gradients(dtype: torch.dtype, hidden_act: str, choice: str) -> None:
    experts = make_experts(dtype, hidden_act)
    experts_TK = torch.tensor(CHOICES[choice])
    x, weights, upstream = (
        torch.randn(len(experts_TK), 12),
        torch.rand(experts_TK.shape),
        torch.randn(len(experts_TK), 12),
    )

    ours = leaves(x, weights, dtype=dtype)
    actual = run(experts, ours[0], experts_TK, ours[1])
    actual.backward(upstream.to(dtype))

    parameters = (experts.gate_up_proj, experts.down_proj)
    twins = leaves(x, weights, *parameters, dtype=torch.float64)
    gate, up = twins[2].chunk(2, dim=1)
    expected = naive_experts(hidden_act, twins[0], experts_TK, twins[1], gate, up, twins[3])
    expected.backward(upstream.double())

    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_near(actual, expected, tolerance)
    for our, twin in zip((*ours, *parameters), twins, strict=True):
        assert_near(our.grad, twin.grad, tolerance)


def test_an_empty_expert_gets_a_zero_gradient() -> None:
    experts = make_experts(torch.float32)
    run(experts, torch.randn(2, 12), torch.tensor([[1, 2], [1, 3]]), torch.rand(2, 2)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[[0, 4]], torch.zeros_like(parameter.grad[[0, 4]]))
        assert (parameter.grad[1:4].flatten(1).norm(dim=1) > 0).all()


def order_of(experts_TK: Tensor) -> TokenPermutation:
    return sort_by_expert(experts_TK, torch.ones(len(experts_TK), dtype=torch.bool), EXPERTS)


def test_dispatch_and_combine_by_finite_differences() -> None:
    destination_TK, source_R, *_ = order_of(torch.tensor(CHOICES["one empty"]))
    x, y = torch.randn(4, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: PermuteTokens.apply(x, destination_TK, source_R), x)
    assert torch.autograd.gradcheck(lambda y: UnpermuteTokens.apply(y, destination_TK, source_R), y)


@pytest.mark.parametrize("choice", CHOICES)
def test_order(choice: str) -> None:
    experts_TK = torch.tensor(CHOICES[choice])
    flat = experts_TK.flatten().tolist()
    order = order_of(experts_TK)
    assert order.source_R.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert order.source_R[order.destination_TK.flatten()].tolist() == list(range(len(flat)))
    assert order.loads_E.tolist() == [flat.count(e) for e in range(EXPERTS)]
    assert order.offsets_E1.tolist() == [sum(e < n for e in flat) for n in range(EXPERTS + 1)]


def test_loads_leave_padding_out() -> None:
    experts_TK = torch.tensor([[0, 3], [1, 3], [0, 1], [3, 4]])
    valid_token_T = torch.tensor([True, False, False, True])
    order = sort_by_expert(experts_TK, valid_token_T, EXPERTS)
    assert order.loads_E.tolist() == [1, 0, 0, 2, 1]
    assert order.loads_E.dtype == torch.int64
    assert order.offsets_E1.tolist() == [0, 2, 4, 4, 7, 8]


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
def test_activation(hidden_act: str) -> None:
    width = projected_width(hidden_act, 6)
    gate, up = torch.randn(2, 4, width, dtype=torch.float64).unbind()
    actual = activate(hidden_act, gate, up)
    assert actual.shape == (4, 6)
    expected = torch.stack([naive_activation(hidden_act, g, u) for g, u in zip(gate, up, strict=True)])
    assert_near(actual, expected, FLOAT64)


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
def test_shared_experts_are_one_of_their_joint_width(hidden_act: str) -> None:
    """With `swiglu`, n experts of width I side by side are one of width n · I: their outputs add."""
    config = tiny_config(hidden_act=hidden_act, n_shared_experts=2)
    shared = SharedExperts(config)
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, config.hidden_size)
    gate, up, down = (
        p.detach().double() for p in (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    )
    assert down.shape == (config.hidden_size, 2 * config.moe_intermediate_size)
    expected = torch.stack([down @ naive_activation(hidden_act, gate @ row, up @ row) for row in x.double()])
    assert_near(shared(x), expected, FLOAT32)
    if hidden_act == "swiglu":
        parts = zip(gate.chunk(2), up.chunk(2), down.chunk(2, dim=1), strict=True)
        each = sum(
            (torch.sigmoid(x.double() @ g.T) * (x.double() @ g.T) * (x.double() @ u.T)) @ d.T for g, u, d in parts
        )
        assert_near(shared(x), each, FLOAT32)


def dropout_probe(dropout: float) -> tuple[Experts, tuple[Tensor, Tensor, Tensor]]:
    """Experts whose output is their inner activations: identity matrices on ones give silu(1) everywhere."""
    config = tiny_config(
        n_routed_experts=1, num_experts_per_tok=1, hidden_size=64, moe_intermediate_size=64, dropout=dropout
    )
    experts = Experts(config)
    experts.gate_up_proj.data = torch.eye(64).repeat(2, 1)[None]
    experts.down_proj.data = torch.eye(64)[None]
    tokens = 500
    return experts, (torch.ones(tokens, 64), torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    share = 0.25
    experts, inputs = dropout_probe(share)
    out = run(experts.train(), *inputs)
    dropped = (out == 0).double().mean().item()
    # A count of n = 32,000 independent draws: five standard deviations are 0.012.
    assert abs(dropped - share) < 5 * (share * (1 - share) / out.numel()) ** 0.5
    kept = out[out != 0]
    torch.testing.assert_close(
        kept, torch.full_like(kept, torch.nn.functional.silu(torch.ones(())).item() / (1 - share))
    )


def test_dropout_follows_the_seed_and_stops_in_evaluation() -> None:
    experts, inputs = dropout_probe(0.25)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(experts.train(), *inputs)

    assert torch.equal(once(3), once(3))
    assert not torch.equal(once(3), once(4))
    assert torch.equal(run(experts.eval(), *inputs), run(dropout_probe(0.0)[0].train(), *inputs))


def test_repeats_bit_for_bit() -> None:
    experts, x = make_experts(torch.float32), torch.randn(40, 12)
    experts_TK, weights_TK = torch.rand(40, EXPERTS).argsort(1)[:, :3], torch.rand(40, 3)

    def once() -> list[Tensor | None]:
        inputs = leaves(x, weights_TK, dtype=torch.float32)
        experts.zero_grad()
        out = run(experts, inputs[0], experts_TK, inputs[1])
        out.square().sum().backward()
        return [out, *(t.grad for t in (*inputs, *experts.parameters()))]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_bfloat16_in_gives_bfloat16_out_and_float32_gradients() -> None:
    experts = make_experts(torch.float32)
    x, weights = torch.randn(3, 12).bfloat16().requires_grad_(), torch.rand(3, 2).requires_grad_()
    out = run(experts, x, torch.tensor([[0, 1], [3, 4], [3, 1]]), weights)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, weights.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert {p.grad.dtype for p in experts.parameters()} == {torch.float32}
