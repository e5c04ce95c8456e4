"""A decoding step's Triton kernels, in Triton's interpreter on the CPU in float32, against their twins in float64.

Run with TRITON_INTERPRET=1 where Triton is installed; tests/gpu has the same cases in bfloat16 on a GPU. A size is odd
on purpose: rows and columns past the end of a tile are where kernels go wrong.
"""

import importlib.util
import os

import pytest
import torch

from decode_cases import ExpertsCase, Place, RouteCase, attention_case, linear_case, twin
from oracles import FLOAT32, assert_near
from p828.kernels.decode import ops, plain

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)
CPU = Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("choices", [None, 1, 3])
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 96, 50), (3, 1032, 33), (5, 96, 50), (33, 264, 70)])
def test_linear(tokens: int, hidden: int, width: int, choices: int | None) -> None:
    for actual, expected in linear_case(CPU, tokens, hidden, width, choices):
        assert_near(actual, expected, FLOAT32)


ATTENTION = {
    "one": ([700], 2, 4, 16, 1000, True, True),
    "first token": ([0, 0], 1, 3, 64, 8, False, True),
    "unequal": ([0, 1, 63, 64, 65, 199, -1, 128], 2, 2, 16, 200, True, False),
    "wide": ([5, 300], 1, 1, 96, 301, False, False),
    "padding": ([-1, -1, 70], 4, 4, 16, 72, False, True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    for actual, expected in attention_case(CPU, *ATTENTION[name]):
        assert_near(actual, expected, FLOAT32)


ROUTES = [
    RouteCase(1, 96, 5, 3),
    RouteCase(3, 1032, 8, 2, shared=2, scoring_func="softmax", norm_topk_prob=False),
    RouteCase(2, 520, 48, 6, n_group=6, topk_group=2),
    RouteCase(16, 64, 12, 4, shared=0, n_group=3, topk_group=2, scoring_func="softmax"),
    RouteCase(2, 64, 1, 1, with_parts=False),
]


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_route(case: RouteCase) -> None:
    arguments = case.arguments(CPU)
    for actual, expected in zip(ops.route(*arguments), twin(plain.route, *arguments), strict=True):
        assert_near(actual, expected, FLOAT32)


def test_route_prefers_the_first_of_equal_experts() -> None:
    arguments = list(RouteCase(2, 64, 7, 3).arguments(CPU))
    arguments[4], arguments[5] = torch.zeros(7, 64), torch.zeros(7)
    for route in (ops.route, plain.route):
        assert route(*arguments)[2].tolist() == [[0, 1, 2, 7]] * 2


EXPERTS = [
    ExpertsCase(1, 96, 40, 5, 3),
    ExpertsCase(2, 264, 33, 4, 2, shared=2, hidden_act="swiglu_of_product"),
    ExpertsCase(3, 64, 16, 5, 5, shared=0),
    ExpertsCase(16, 96, 40, 5, 3),
    ExpertsCase(33, 160, 33, 6, 2, shared=2, hidden_act="swiglu_of_product", used=3),
    ExpertsCase(70, 64, 16, 5, 1, shared=0, used=1),
]


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts(case: ExpertsCase) -> None:
    arguments = case.arguments(CPU)
    assert_near(ops.experts(*arguments), twin(plain.experts, *arguments), FLOAT32)
