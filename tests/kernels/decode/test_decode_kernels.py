"""A decoding step's Triton kernels, in Triton's interpreter on the CPU in float32, against their twins in float64.

Run with TRITON_INTERPRET=1 where Triton is installed; tests/gpu has the same cases in bfloat16 on a GPU. A size is odd
on purpose: rows and columns past the end of a tile are where kernels go wrong.
"""

import importlib.util
import os
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
from oracles import FLOAT32, assert_near
from p828.kernels.decode import ops

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)
CPU = Place(torch.device("cpu"), torch.float32)


def test_the_cases_reach_every_kernel() -> None:
    """Several tokens that share a program's rows of weights, and more than such a program takes."""
    from p828.kernels.decode import experts_triton, linear_triton

    for most, cases in (
        (linear_triton.VECTOR_TOKENS, [tokens for tokens, _, _ in LINEARS]),
        (experts_triton.PAIR_TOKENS, [case.tokens for case in EXPERTS]),
        (ops.FEW_TOKENS, [len(positions) for positions, *_ in ATTENTIONS.values()]),
    ):
        assert 1 in cases
        assert any(1 < tokens <= most for tokens in cases)
        assert any(most < tokens for tokens in cases)


@pytest.mark.parametrize("choices", [None, 1, 3])
@pytest.mark.parametrize("tokens, hidden, width", LINEARS)
def test_linear(tokens: int, hidden: int, width: int, choices: int | None) -> None:
    for actual, expected in linear_case(CPU, tokens, hidden, width, choices):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("case", [embed_norm_linear_case, logits_case])
@pytest.mark.parametrize("tokens, hidden, width", [*LINEARS, (1, 24, 1537)])
def test_a_steps_first_and_last_product(case: Callable[..., Pairs], tokens: int, hidden: int, width: int) -> None:
    for actual, expected in case(CPU, tokens, hidden, width):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    for actual, expected in attention_case(CPU, *ATTENTIONS[name]):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_route(case: RouteCase) -> None:
    for actual, expected in route_case(CPU, case):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("cases", [ROUTES, EQUAL_SCORES])
def test_some_cases_of_route_are_split(cases: list[RouteCase]) -> None:
    from p828.kernels.decode import route_triton

    assert {route_triton.is_split(case.tokens, case.hidden, case.experts) for case in cases} == {True, False}


@pytest.mark.parametrize("case", EQUAL_SCORES, ids=str)
def test_route_prefers_the_first_of_equal_experts(case: RouteCase) -> None:
    for actual, expected in equal_scores_case(CPU, case):
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("case", EQUAL_SCORES, ids=str)
def test_route_chooses_experts_for_a_token_without_scores(case: RouteCase) -> None:
    for actual, expected in no_scores_case(CPU, case):
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts(case: ExpertsCase) -> None:
    arguments = case.arguments(CPU)
    expected_TJH = twin(plain.experts, *arguments)
    parts_TXH = ops.experts(*arguments)
    assert_near(parts_TXH.sum(dim=1), expected_TJH.sum(dim=1), FLOAT32)


@pytest.mark.parametrize("tokens, width", TOKENS)
def test_tokens(tokens: int, width: int) -> None:
    for actual, expected in tokens_case(CPU, tokens, width):
        assert actual.tolist() == expected.tolist()
