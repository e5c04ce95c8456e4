"""The experts' kernels in bfloat16 against the plain mixture in float64, values and gradients.

Inputs and weights are on the grid of bfloat16 before either side sees them; what is left are the kernels' roundings of
the first product, the activation, the outputs of each expert and their sum: `BFLOAT16`.
"""

import copy

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, assert_near, leaves
from p828.kernels.moe.swiglu_down import swiglu_down
from p828.kernels.moe.tiles import TILE
from p828.model.backend import experts_backend
from p828.model.experts import Experts, SharedExperts, TokenPermutation, sort_by_expert
from tiny import tiny_config

EXPERTS = 5


def choices(tokens: int, per_token: int, experts: int = EXPERTS) -> Tensor:
    """Not contiguous, where a token has more experts to choose from."""
    return torch.rand(tokens, experts).argsort(1)[:, :per_token]


CHOICES = {
    "every expert used": choices(500, 2),
    "one choice": choices(300, 1),
    "K = E": choices(130, EXPERTS),
    "all on one": torch.full((200, 1), 2),
    "all on the last": torch.full((129, 1), 4),
    "first and last empty": 1 + choices(257, 2, 3),
    "whole tiles": torch.arange(TILE * EXPERTS).remainder(EXPERTS)[:, None],
    "one token": torch.tensor([[3, 1]]),
}
SIZES = {"round": (64, 64), "past a tile": (264, 136), "small": (8, 8), "wide": (512, 768)}


def make_experts(hidden: int, inner: int, hidden_act: str) -> Experts:
    experts = Experts(
        tiny_config(hidden_act=hidden_act, n_routed_experts=EXPERTS, hidden_size=hidden, moe_intermediate_size=inner)
    )
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape) * parameter.shape[2] ** -0.5).bfloat16().float()
    return experts


def run(experts: Experts, x: Tensor, experts_TK: Tensor, weights: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """The output and the gradients of x, the weights and the parameters."""
    out = experts(x, weights, experts.permutation(x, experts_TK, None))
    out.backward(upstream)
    return [out, x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("generation", ["own", 8, 12])
def test_against_float64(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, hidden_act: str, sizes: str, choice: str, generation: object
) -> None:
    if generation != "own":  # tiles of other GPUs, loaded through pointers or the tensor memory accelerator
        from p828.kernels.moe import grouped_gemm_triton

        monkeypatch.setattr(grouped_gemm_triton, "generation", lambda device: generation)
    hidden, inner = SIZES[sizes]
    experts_TK = CHOICES[choice]
    experts = make_experts(hidden, inner, hidden_act)
    weights = torch.rand(experts_TK.shape)
    x, upstream = (torch.randn(len(experts_TK), hidden).bfloat16() for _ in range(2))
    twin = make_experts(hidden, inner, hidden_act).double()
    twin.load_state_dict(experts.state_dict())
    expected = run(
        twin, *leaves(x, dtype=torch.float64), experts_TK, *leaves(weights, dtype=torch.float64), upstream.double()
    )
    ours = experts.to(cuda, torch.bfloat16)
    device = (leaves(x, dtype=torch.bfloat16, device=cuda)[0], experts_TK.to(cuda))
    actual = run(ours, *device, *leaves(weights, dtype=torch.float32, device=cuda), upstream.to(cuda))
    assert ours.permutation(*device, None).tile_expert is not None
    for our, theirs in zip(actual, expected, strict=True):
        # Twice, for the weights of one token are sums of a few products that nearly cancel.
        assert_near(our, theirs, 2 * BFLOAT16)
    empty = torch.bincount(experts_TK.flatten(), minlength=EXPERTS) == 0
    for gradient in actual[3:]:
        assert gradient is not None
        assert torch.equal(gradient[empty.to(cuda)], torch.zeros_like(gradient[empty.to(cuda)]))


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tokens", [1, 333])
def test_shared_experts_against_float64(cuda: torch.device, hidden_act: str, sizes: str, tokens: int) -> None:
    hidden, inner = SIZES[sizes]
    shared = SharedExperts(tiny_config(hidden_act=hidden_act, hidden_size=hidden, moe_intermediate_size=inner))
    for parameter in shared.parameters():
        parameter.data = (torch.randn(parameter.shape) * parameter.shape[1] ** -0.5).bfloat16().float()
    twin = copy.deepcopy(shared).double()
    ours = shared.to(cuda, torch.bfloat16)
    x, upstream = (torch.randn(tokens, hidden).bfloat16() for _ in range(2))
    (our_x,), (their_x,) = leaves(x, dtype=torch.bfloat16, device=cuda), leaves(x, dtype=torch.float64)
    assert experts_backend("swiglu", our_x.device, our_x.dtype, drops=False) == "triton"
    our_out, their_out = ours(our_x), twin(their_x)
    our_out.backward(upstream.to(cuda))
    their_out.backward(upstream.double())
    assert_near(our_out, their_out, BFLOAT16)
    for our, theirs in zip((our_x, *ours.parameters()), (their_x, *twin.parameters()), strict=True):
        assert_near(our.grad, theirs.grad, BFLOAT16)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("experts", [EXPERTS, 48, 200])
def test_order(cuda: torch.device, choice: str, experts: int) -> None:
    """As the plain order, with each expert's rows in whole tiles."""
    experts_TK = CHOICES[choice] if experts == EXPERTS else choices(3000, 6, experts)
    valid_token_T = torch.rand(len(experts_TK)) < 0.8
    plain = sort_by_expert(experts_TK, valid_token_T, experts)
    layer = Experts(tiny_config(n_routed_experts=experts))
    x = torch.empty(len(experts_TK), 8, dtype=torch.bfloat16, device=cuda)
    padded = TokenPermutation(
        *(field.cpu() for field in layer.permutation(x, experts_TK.to(cuda), valid_token_T.to(cuda)))
    )
    assert torch.equal(padded.loads_E, plain.loads_E)
    sizes = -(plain.offsets_E1.diff() // -TILE) * TILE
    assert torch.equal(padded.offsets_E1.diff(), sizes.int())
    assert padded.tile_expert is not None
    assert torch.equal(
        padded.tile_expert[: sizes.sum() // TILE], torch.arange(experts).repeat_interleave(sizes // TILE)
    )
    assert torch.equal(padded.source_R[padded.source_R >= 0], plain.source_R.int())
    assert torch.equal(padded.source_R[padded.destination_TK.flatten()], torch.arange(experts_TK.numel()))
    assert torch.equal(padded.tile_expert[padded.destination_TK // TILE], experts_TK.int())


def test_strided_inputs(cuda: torch.device) -> None:
    """Gate and up as the halves of one product; a router's weights as columns of more."""
    gate_up, down = torch.randn(333, 128, device=cuda).bfloat16(), torch.randn(32, 64, device=cuda).bfloat16()
    gate, up = gate_up.chunk(2, dim=1)
    actual = leaves(gate_up, down, dtype=torch.bfloat16, device=cuda)
    expected = leaves(gate, up, down, dtype=torch.bfloat16, device=cuda)
    actual_out, expected_out = swiglu_down(*actual[0].chunk(2, dim=1), actual[1]), swiglu_down(*expected)
    assert torch.equal(actual_out, expected_out)
    for out in (actual_out, expected_out):
        out.sum().backward()
    assert torch.equal(actual[0].grad, torch.cat([x.grad for x in expected[:2]], dim=1))
    assert torch.equal(actual[1].grad, expected[2].grad)

    experts, experts_TK = make_experts(64, 64, "swiglu").to(cuda, torch.bfloat16), choices(333, 2).to(cuda)
    x, weights = torch.randn(333, 64, device=cuda).bfloat16(), torch.rand(333, 2, device=cuda)
    order = experts.permutation(x, experts_TK, None)
    strided = x.T.contiguous().T, weights.T.contiguous().T
    assert torch.equal(experts(*strided, order), experts(x, weights, order))


def test_repeats_bit_for_bit(cuda: torch.device) -> None:
    experts = make_experts(256, 128, "swiglu").to(cuda, torch.bfloat16)
    experts_TK, weights = choices(2000, 2).to(cuda), torch.rand(2000, 2, device=cuda)
    x, upstream = torch.randn(2, 2000, 256, device=cuda).bfloat16()

    def once() -> list[Tensor | None]:
        experts.zero_grad()
        inputs = leaves(x, dtype=torch.bfloat16, device=cuda) + leaves(weights, dtype=torch.float32, device=cuda)
        return run(experts, inputs[0], experts_TK, inputs[1], upstream)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)
