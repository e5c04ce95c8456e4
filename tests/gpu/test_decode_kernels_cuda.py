"""A decoding step's kernels in bfloat16 against their plain twins, which take the same inputs, rounded, in float64.

A kernel rounds what it hands to a product on tensor cores (normed rows, rotated queries, softmax weights, an expert's
inner activations) and its result, 2^-9 each, and sums in float32: `BFLOAT16` covers that.
"""

from collections.abc import Callable

import pytest
import torch

import decode_twins as plain
from decode_cases import (
    ATTENTIONS,
    EQUAL_SCORES,
    EXPERTS,
    LINEARS,
    ROUTES,
    TOKENS,
    ExpertsCase,
    Pairs,
    Place,
    RouteCase,
    attention_case,
    embed_norm_linear_case,
    equal_scores_case,
    linear_case,
    logits_case,
    no_scores_case,
    route_case,
    tokens_case,
    twin,
)
from oracles import BFLOAT16, FLOAT32, assert_near
from p828.kernels.decode import ops


@pytest.mark.parametrize("choices", [None, 3])
@pytest.mark.parametrize("tokens, hidden, width", [*LINEARS, (1, 1024, 1536), (70, 512, 1000)])
def test_linear(cuda: torch.device, tokens: int, hidden: int, width: int, choices: int | None) -> None:
    for actual, expected in linear_case(Place(cuda, torch.bfloat16), tokens, hidden, width, choices):
        assert_near(actual, expected, BFLOAT16)


@pytest.mark.parametrize("case", [embed_norm_linear_case, logits_case])
@pytest.mark.parametrize("tokens, hidden, width", [*LINEARS, (1, 1024, 1537), (70, 512, 1000)])
def test_a_steps_first_and_last_product(
    cuda: torch.device, case: Callable[..., Pairs], tokens: int, hidden: int, width: int
) -> None:
    for actual, expected in case(Place(cuda, torch.bfloat16), tokens, hidden, width):
        assert_near(actual, expected, BFLOAT16)


@pytest.mark.parametrize("name", [*ATTENTIONS, "long"])
def test_attention(cuda: torch.device, name: str) -> None:
    case = ([4095, 17], 4, 4, 64, 4096, True, True) if name == "long" else ATTENTIONS[name]
    for actual, expected in attention_case(Place(cuda, torch.bfloat16), *case):
        assert_near(actual, expected, BFLOAT16)


MANY_EXPERTS = [
    RouteCase(1, 2048, 256, 8, n_group=8, topk_group=4, parts=8),
    RouteCase(4, 1024, 256, 8, parts=4),
    RouteCase(8, 1024, 256, 8),
]


@pytest.mark.parametrize("case", [*ROUTES, *MANY_EXPERTS], ids=str)
def test_route(cuda: torch.device, case: RouteCase) -> None:
    """In float32, where both forms see the same scores: a rounding apart, equal experts need not be chosen."""
    for actual, expected in route_case(Place(cuda, torch.float32), case):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("case", EQUAL_SCORES, ids=str)
def test_route_of_equal_scores_and_of_none(cuda: torch.device, case: RouteCase) -> None:
    place = Place(cuda, torch.bfloat16)
    for actual, expected in (*equal_scores_case(place, case), *no_scores_case(place, case)):
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("tokens, experts", [(33, 4), (2, 48)])
def test_route_in_bfloat16(cuda: torch.device, tokens: int, experts: int) -> None:
    """Every expert is chosen, so only the order may differ."""
    arguments = RouteCase(tokens, 1024, experts, experts, shared=0).arguments(Place(cuda, torch.bfloat16))
    total_TH, normed_TH, experts_TK, weights_TK = ops.route(*arguments)
    expected = twin(plain.route, *arguments)
    assert_near(total_TH, expected[0], BFLOAT16)
    assert_near(normed_TH, expected[1], BFLOAT16)
    by_expert = weights_TK.gather(1, experts_TK.long().argsort(1))
    assert_near(by_expert, expected[3].gather(1, expected[2].long().argsort(1)), BFLOAT16)


LARGE = [
    ExpertsCase(1, 1024, 2048, 8, 2),
    ExpertsCase(64, 1024, 512, 48, 6),
    ExpertsCase(256, 512, 768, 4, 2, hidden_act="swiglu_of_product"),
]


@pytest.mark.parametrize("case", [*EXPERTS, *LARGE], ids=str)
def test_experts(cuda: torch.device, case: ExpertsCase) -> None:
    arguments = case.arguments(Place(cuda, torch.bfloat16))
    expected_TJH = twin(plain.experts, *arguments)
    parts_TXH = ops.experts(*arguments)
    assert_near(parts_TXH.sum(dim=1), expected_TJH.sum(dim=1), BFLOAT16)


@pytest.mark.parametrize("tokens, experts", [(1, 8), (3, 8), (9, 8), (40, 8), (1, 64), (3, 64), (4, 256)])
def test_a_captured_step_reads_its_tensors_again(cuda: torch.device, tokens: int, experts: int) -> None:
    """Routing and experts of few tokens and of many, replayed with other rows in the same memory.

    The kernels may begin before the one in front has ended (`dependent_launch_triton`): 50 replays with new rows would
    show one that reads too early.
    """
    place = Place(cuda, torch.bfloat16)
    x_TH, parts_TJH, *rest = RouteCase(tokens, 512, experts, 2).arguments(place)
    weights = ExpertsCase(1, 512, 256, experts, 2).arguments(place)[3:]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        total_TH, normed_TH, experts_TJ, weights_TJ = ops.route(x_TH, parts_TJH, *rest)
        parts = ops.experts(normed_TH, experts_TJ, weights_TJ, *weights)
        return ops.norm_linear(total_TH, parts, rest[0], 1e-5, weights[0][0], torch.float32)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(50):
        x_TH.copy_(torch.randn(tokens, 512))
        graph.replay()
        again = [result.clone() for result in captured]
        for actual, expected in zip(again, step(), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("tokens, width", TOKENS)
def test_tokens(cuda: torch.device, tokens: int, width: int) -> None:
    for actual, expected in tokens_case(Place(cuda, torch.bfloat16), tokens, width):
        assert actual.tolist() == expected.tolist()
