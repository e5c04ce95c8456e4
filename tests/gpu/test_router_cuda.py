"""The router's product on tensor cores against float64, values and gradients; its choice against topk."""

import pytest
import torch

from oracles import BFLOAT16, FLOAT32, assert_near, leaves
from p828.kernels.router import choose_experts, router_logits


@pytest.mark.parametrize("experts", [1, 4, 48, 200])
@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_against_float64(cuda: torch.device, experts: int, tokens: int) -> None:
    x, weight, upstream = torch.randn(tokens, 256).bfloat16(), torch.randn(experts, 256), torch.randn(tokens, experts)
    twins = leaves(x, weight, dtype=torch.float64)
    expected = twins[0] @ twins[1].T
    expected.backward(upstream.double())
    ours = leaves(x, dtype=torch.bfloat16, device=cuda) + leaves(weight, dtype=torch.float32, device=cuda)
    actual = router_logits(*ours)
    actual.backward(upstream.to(cuda))
    assert actual.dtype == ours[1].grad.dtype == torch.float32
    assert_near(actual, expected, FLOAT32)
    # The logits' gradient has 16 bits, 2^-17 = 8e-6 per term, in the weight's gradient; tokens round to bfloat16.
    assert_near(ours[1].grad, twins[1].grad, 1e-5)
    assert_near(ours[0].grad, twins[0].grad, BFLOAT16)


@pytest.mark.parametrize("experts,per_token", [(1, 1), (4, 2), (8, 8), (48, 6), (200, 3)])
@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_choice(cuda: torch.device, experts: int, per_token: int, tokens: int) -> None:
    scores = torch.rand(tokens, experts, device=cuda)
    scores[:, : experts // 2] = float("-inf") if experts >= 2 * per_token else scores[:, : experts // 2]
    assert torch.equal(choose_experts(scores, per_token), scores.topk(per_token, dim=-1).indices)


def test_of_equal_scores_the_first_is_chosen(cuda: torch.device) -> None:
    assert choose_experts(torch.zeros(2, 5, device=cuda), 3).tolist() == [[0, 1, 2]] * 2
