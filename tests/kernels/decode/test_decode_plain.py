"""The plain twins of a decoding step's operations against the model's own layers, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decode_twins as plain
from decode_cases import ROUTES, ExpertsCase, Place, RouteCase
from oracles import FLOAT64, assert_near, naive_attention
from p828.config import ModelConfig
from p828.model.experts import Experts, SharedExperts
from p828.model.router import Router

CPU = Place(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_route_is_the_router_behind_a_norm(case: RouteCase) -> None:
    x_TH, parts_TJH, gain_H, eps, weight_EH, bias_E, *rest = case.arguments(CPU)
    weight_EH, bias_E = weight_EH.double(), bias_E.double()
    parts_TJH = None if parts_TJH is None else parts_TJH.double()
    config = ModelConfig(
        hidden_size=case.hidden, n_routed_experts=case.experts, num_experts_per_tok=case.per_token,
        scoring_func=case.scoring_func, n_group=case.n_group, topk_group=case.topk_group,
        norm_topk_prob=case.norm_topk_prob, routed_scaling_factor=rest[-2],
    )  # fmt: skip
    router = Router(config).double()
    router.weight.data.copy_(weight_EH)
    router.e_score_correction_bias.copy_(bias_E)
    total_TH = x_TH if parts_TJH is None else x_TH + parts_TJH.sum(dim=1)
    normed_TH = F.rms_norm(total_TH, gain_H.shape, gain_H.double(), eps)
    routing = router(normed_TH)
    total, normed, experts_TJ, weights_TJ = plain.route(x_TH, parts_TJH, gain_H, eps, weight_EH, bias_E, *rest)
    assert_near(total, total_TH, FLOAT64)
    assert_near(normed, normed_TH, FLOAT64)
    assert torch.equal(experts_TJ[:, : case.per_token].long(), routing.experts_TK)
    assert_near(weights_TJ[:, : case.per_token], routing.weights_TK, FLOAT64)
    shared = list(range(case.experts, case.experts + case.shared))
    assert experts_TJ[:, case.per_token :].tolist() == [shared] * case.tokens
    assert (weights_TJ[:, case.per_token :] == 1).all()


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
def test_experts_are_the_models(hidden_act: str) -> None:
    """Two shared experts are one of twice the width, its projections' rows and columns cut."""
    case = ExpertsCase(7, 24, 10, 5, 3, shared=2, hidden_act=hidden_act)
    x_TH, experts_TJ, weights_TJ, gate_up, down, _, _, _ = case.arguments(CPU)
    weights_TJ = torch.cat((weights_TJ[:, :3].double(), torch.ones(7, 2)), dim=1)
    config = ModelConfig(
        hidden_size=24, moe_intermediate_size=10, n_routed_experts=5, n_shared_experts=2, hidden_act=hidden_act
    )
    layer, shared = Experts(config).double(), SharedExperts(config).double()
    for parameter in (*layer.parameters(), *shared.parameters()):
        nn.init.normal_(parameter)
    gate_up, down = layer.gate_up_proj.data, layer.down_proj.data
    permutation = layer.permutation(x_TH, experts_TJ[:, :3].long(), None)
    expected = layer(x_TH, weights_TJ[:, :3], permutation) + shared(x_TH)
    parts_TJH = plain.experts(
        x_TH, experts_TJ, weights_TJ, gate_up, down, *cut_shared_experts(shared, 2, hidden_act), hidden_act
    )
    assert_near(parts_TJH.sum(dim=1), expected, FLOAT64)


def cut_shared_experts(shared: SharedExperts, count: int, hidden_act: str) -> tuple[Tensor, Tensor]:
    halves = 2 if hidden_act == "swiglu_of_product" else 1  # inner number i needs rows i and i + n I of gate and up

    def cut(weight_PH: Tensor) -> Tensor:
        return weight_PH.unflatten(0, (halves, count, -1)).transpose(0, 1).flatten(1, 2)

    gate_up = torch.cat((cut(shared.gate_proj.weight), cut(shared.up_proj.weight)), dim=1)
    return gate_up.detach(), shared.down_proj.weight.detach().unflatten(1, (count, -1)).transpose(0, 1).contiguous()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_the_reference_of_a_whole_sequence(with_sinks: bool) -> None:
    """Two sequences token by token in slots 2 and 0, the second one shorter and padding from then on."""
    lengths, heads, groups, head_dim = (9, 5), 6, 2, 8
    qkv_BSXD = CPU.randn(2, 9, heads + 2 * groups, head_dim)
    q_gain, k_gain = CPU.randn(2, head_dim)
    sinks_N = CPU.randn(heads) if with_sinks else None
    frequencies = 0.3 ** torch.arange(head_dim // 2)
    q, k, v = qkv_BSXD.split((heads, groups, groups), dim=2)
    angles = torch.arange(9)[None, :, None, None].float() * frequencies
    rotary = angles.double().cos() * 1.2, angles.double().sin() * 1.2
    q, k = (
        apply_rotary_double(F.rms_norm(x, (head_dim,), gain, 1e-5), rotary) for x, gain in ((q, q_gain), (k, k_gain))
    )
    expected = naive_attention(q, k, v, sinks_N, torch.zeros(2, 9, dtype=torch.long))
    keys, values = (torch.full((3, groups, 9, head_dim), torch.nan, dtype=torch.float64) for _ in range(2))
    for s in range(9):
        slots_T = torch.tensor([2, 0 if s < lengths[1] else -1], dtype=torch.int32)
        out = plain.attention(
            qkv_BSXD[:, s].contiguous(), keys, values, slots_T, torch.full((3,), s), frequencies, 1.2, q_gain, k_gain,
            sinks_N, 1e-5, None, torch.eye(q.shape[-1] * q.shape[-2], dtype=torch.float64),
        )  # fmt: skip
        assert_near(out[0], expected[0, s].flatten(), FLOAT64)
        if s < lengths[1]:
            assert_near(out[1], expected[1, s].flatten(), FLOAT64)
        else:
            assert not out[1].any()
    assert keys[1].isnan().all()
    assert keys[0, :, lengths[1] :].isnan().all()
    assert_near(keys[2], k[0].transpose(0, 1), FLOAT64)


def apply_rotary_double(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * rotary[0] - second * rotary[1], second * rotary[0] + first * rotary[1]), dim=-1)
