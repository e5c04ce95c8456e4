"""Inputs for a decoding step's operations, and their plain twins in a wider dtype as the oracle.

A case runs an operation of `p828.kernels.decode.ops` on a device in a dtype, and its twin with the same numbers in
float64 on the CPU (the inputs are rounded first). Each yields pairs (actual, expected).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import decode_twins as plain
from p828.kernels.decode import ops

Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Place:
    """Where and in which dtype a kernel is tried."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape) * scale).to(self.device, dtype or self.dtype)


def twin(function: Callable[..., Any], *arguments: Any) -> Any:
    """The plain twin's result in float64 on the CPU. Whole numbers stay what they are."""
    wide = (a.detach().cpu() if isinstance(a, Tensor) else a for a in arguments)
    return function(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in wide))


def linear_case(place: Place, tokens: int, hidden: int, width: int, choices: int | None) -> Pairs:
    """The product alone, with a norm, and with a sum of parts in front of it (`choices` of them, or none)."""
    x_TH, weight_VH = place.randn(tokens, hidden), place.randn(width, hidden, scale=hidden**-0.5)
    gain_H = place.randn(hidden, dtype=torch.float32)
    parts_TJH = None if choices is None else place.randn(tokens, choices, hidden, dtype=torch.float32)
    yield (
        ops.linear(x_TH, weight_VH, torch.float32),
        twin(lambda x, w: plain.linear(x, w, torch.float64), x_TH, weight_VH),
    )
    arguments = (x_TH, parts_TJH, gain_H, 1e-5)
    # Before `add_norm`, whose freed result could be what an operation that writes no sum hands out.
    actual = ops.norm_linear(*arguments, weight_VH, torch.float32)
    expected = twin(plain.norm_linear, *arguments, weight_VH, torch.float64)
    yield from zip(actual, expected, strict=True)
    yield from zip(ops.add_norm(*arguments), twin(plain.add_norm, *arguments), strict=True)


def embed_norm_linear_case(place: Place, tokens: int, hidden: int, width: int) -> Pairs:
    """A product of the embeddings of what is newest in some slots."""
    embedding_VH, weight_VH = place.randn(19, hidden), place.randn(width, hidden, scale=hidden**-0.5)
    gain_H = place.randn(hidden, dtype=torch.float32)
    slots_T, token_S = (values.to(place.device) for values in (torch.randperm(tokens), torch.randint(19, (tokens,))))
    arguments = embedding_VH, slots_T, token_S, gain_H, 1e-5, weight_VH
    yield from zip(ops.embed_norm_linear(*arguments), twin(plain.embed_norm_linear, *arguments), strict=True)


def logits_case(place: Place, tokens: int, hidden: int, width: int) -> Pairs:
    """After positions of which one is even and the next one odd: rows are read from the first and from the last."""
    x_TH, head_VH = place.randn(tokens, hidden), place.randn(width, hidden, scale=hidden**-0.5)
    parts_TJH, gain_H = (place.randn(*shape, hidden, dtype=torch.float32) for shape in ((tokens, 2), ()))
    slots_T = torch.randperm(tokens).to(place.device)
    for position in (6, 7):
        position_S = torch.full((tokens,), position, device=place.device)
        arguments = x_TH, parts_TJH, gain_H, 1e-5, head_VH, slots_T, position_S
        yield ops.logits(*arguments), twin(plain.logits, *arguments)


def attention_case(
    place: Place, positions: list[int], groups: int, sharing: int, head_dim: int, context: int, norms: bool, sinks: bool
) -> Pairs:
    """A sequence for each position; a negative one is padding."""
    tokens, slots = len(positions), len(positions) + 2
    qkv_TXD = place.randn(tokens, groups * sharing + 2 * groups, head_dim)
    keys_SGCD, values_SGCD = (place.randn(slots, groups, context, head_dim) for _ in range(2))
    slots_T = torch.randperm(slots)[:tokens]
    positions_T = torch.tensor(positions)
    position_S = torch.zeros(slots, dtype=torch.int64)
    position_S[slots_T] = positions_T.clamp_min(0)
    slots_T, position_S = torch.where(positions_T < 0, -1, slots_T).to(place.device), position_S.to(place.device)
    frequencies = (10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))).to(place.device)
    gains = [place.randn(head_dim, dtype=torch.float32) if norms else None for _ in range(2)]
    sinks_N = place.randn(groups * sharing, dtype=torch.float32) if sinks else None
    arrivals_TG = torch.zeros(tokens + 1, groups, dtype=torch.int32, device=place.device)
    o_proj_HX = place.randn(40, groups * sharing * head_dim, scale=(groups * sharing * head_dim) ** -0.5)
    rest = (slots_T, position_S, frequencies, 1.1, *gains, sinks_N, 1e-5, arrivals_TG, o_proj_HX)
    caches = [cache.detach().cpu().double() for cache in (keys_SGCD, values_SGCD)]
    expected = twin(lambda qkv, *others: plain.attention(qkv, *caches, *others), qkv_TXD, *rest)
    for _ in range(2):  # twice: the counts are zero again
        yield ops.attention(qkv_TXD, keys_SGCD, values_SGCD, *rest).sum(dim=1), expected
        yield keys_SGCD, caches[0]
        yield values_SGCD, caches[1]
        assert not arrivals_TG.any()


@dataclass(frozen=True)
class RouteCase:
    tokens: int
    hidden: int
    experts: int
    per_token: int
    shared: int = 1
    scoring_func: str = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    parts: int = 2

    def arguments(self, place: Place) -> tuple[Any, ...]:
        return (
            place.randn(self.tokens, self.hidden),
            place.randn(self.tokens, self.parts, self.hidden, dtype=torch.float32) if self.parts else None,
            place.randn(self.hidden, dtype=torch.float32),
            1e-5,
            place.randn(self.experts, self.hidden, scale=self.hidden**-0.5, dtype=torch.float32),
            place.randn(self.experts, scale=0.1, dtype=torch.float32),
            self.per_token,
            self.shared,
            self.scoring_func,
            self.n_group,
            self.topk_group,
            self.norm_topk_prob,
            2.5,
            torch.zeros(self.tokens + 1, dtype=torch.int32, device=place.device),
        )


def route_case(place: Place, case: RouteCase) -> Pairs:
    arguments = case.arguments(place)
    expected = twin(plain.route, *arguments)
    for _ in range(2):  # twice: the counts are zero again
        yield from zip(ops.route(*arguments), expected, strict=True)
        assert not arguments[-1].any()


def equal_scores_case(place: Place, case: RouteCase) -> Pairs:
    """The ids, where the later half of the experts scores higher; within each half all scores are equal."""
    x_TH, parts_TJH, gain_H, eps, router_EH, bias_E, *rest = case.arguments(place)
    bias_E = (torch.arange(case.experts) >= case.experts // 2).to(bias_E)
    arguments = (x_TH, parts_TJH, gain_H, eps, torch.zeros_like(router_EH), bias_E, *rest)
    later, earlier = range(case.experts // 2, case.experts), range(case.experts // 2)
    shared = range(case.experts, case.experts + case.shared)
    expected = torch.tensor([[*[*later, *earlier][: case.per_token], *shared]] * case.tokens, dtype=torch.int32)
    yield ops.route(*arguments)[2], expected
    yield twin(plain.route, *arguments)[2], expected


def no_scores_case(place: Place, case: RouteCase) -> Pairs:
    """The ids of a token that is no number: different ones below E, since those from E on are the shared experts'."""
    x_TH, *rest = case.arguments(place)
    x_TH[-1] = torch.nan
    shared = range(case.experts, case.experts + case.shared)
    yield ops.route(x_TH, *rest)[2][-1], torch.tensor([*range(case.per_token), *shared], dtype=torch.int32)


@dataclass(frozen=True)
class ExpertsCase:
    tokens: int
    hidden: int
    width: int
    experts: int
    per_token: int
    shared: int = 1
    hidden_act: str = "swiglu"
    used: int | None = None
    """Experts that tokens go to, the first ones; the others get none."""

    def arguments(self, place: Place) -> tuple[Any, ...]:
        projected = self.width * (2 if self.hidden_act == "swiglu_of_product" else 1)
        chosen_TK = torch.rand(self.tokens, self.used or self.experts).argsort(dim=1)[:, : self.per_token]
        shared_ids = torch.arange(self.shared) + self.experts
        experts_TJ = torch.cat((chosen_TK, shared_ids.expand(self.tokens, -1)), dim=1).to(place.device, torch.int32)
        weights_TJ = place.randn(*experts_TJ.shape, dtype=torch.float32)

        def stacked(count: int) -> list[Tensor]:
            return [
                place.randn(count, 2 * projected, self.hidden, scale=self.hidden**-0.5),
                place.randn(count, self.hidden, self.width, scale=self.width**-0.5),
            ]

        shared = stacked(self.shared) if self.shared else [None, None]
        return (place.randn(self.tokens, self.hidden), experts_TJ, weights_TJ, *stacked(self.experts), *shared,
                self.hidden_act)  # fmt: skip


def tokens_case(place: Place, tokens: int, width: int) -> Pairs:
    """Rows that are greedy and rows that draw, one with equal maxima, one with a number that is not finite."""
    slots, length = tokens + 2, 9
    embedding_VH = place.randn(width, 24)
    logits_TV = place.randn(tokens, width, dtype=torch.float32, scale=2.0)
    logits_TV[0, [width // 3, width - 1]] = 100.0
    logits_TV[-1, width - 1] = torch.inf if tokens > 1 else 100.0
    temperature_S = (torch.arange(slots) % 3 * 0.6).to(place.device)
    uniform_SC = torch.rand(slots, length)
    uniform_SC[1] = 0.999
    uniform_SC[2] = 0.0
    uniform_SC = uniform_SC.to(place.device)
    slots_T = torch.randperm(slots)[:tokens].to(place.device)
    token_S, position_S = torch.randint(width, (slots,)), torch.randint(length, (slots,))
    arrivals_T = torch.zeros(slots, dtype=torch.int32, device=place.device)
    for _ in range(2):  # twice: the counts are zero again
        ours, theirs = ([x.to(device, copy=True) for x in (token_S, position_S)] for device in (place.device, "cpu"))
        ours.append(torch.full((slots, length), -2, dtype=torch.int32, pin_memory=place.device.type == "cuda"))
        theirs.append(ours[2].clone())
        yield ops.embed(embedding_VH, slots_T, ours[0]), twin(plain.embed, embedding_VH, slots_T, theirs[0])
        yield (
            ops.choose_tokens(logits_TV, slots_T, temperature_S, uniform_SC, *ours, arrivals_T),
            twin(plain.choose_tokens, logits_TV, slots_T, temperature_S, uniform_SC, *theirs, None),
        )
        yield from zip(ours, theirs, strict=True)
        assert not arrivals_T.any()


TOKENS = [(1, 70), (5, 4096), (7, 9000)]
LINEARS = [(1, 96, 50), (2, 1032, 33), (3, 1032, 33), (5, 96, 50), (33, 264, 70)]
ATTENTIONS: dict[str, tuple[list[int], int, int, int, int, bool, bool]] = {
    "one": ([700], 2, 4, 16, 1000, True, True),
    "first token": ([0, 0], 1, 3, 64, 8, False, True),
    "unequal": ([0, 1, 63, 64, 65, 199, -1, 128], 2, 2, 16, 200, True, False),
    "wide": ([5, 300], 1, 1, 96, 301, False, False),
    "padding": ([-1, -1, 70], 4, 4, 16, 72, False, True),
    "one key head": ([40, -1], 1, 32, 128, 41, True, True),
}
ROUTES = [
    RouteCase(1, 96, 5, 3),
    RouteCase(3, 1032, 8, 2, shared=2, scoring_func="softmax", norm_topk_prob=False),
    RouteCase(16, 64, 12, 4, shared=0, n_group=3, topk_group=2, scoring_func="softmax"),
    RouteCase(2, 64, 1, 1, parts=0),
    RouteCase(5, 520, 48, 6, n_group=6, topk_group=2),
    RouteCase(9, 40, 256, 8, norm_topk_prob=False),
    # A program for each expert.
    RouteCase(1, 9000, 2, 1),
    RouteCase(3, 2056, 7, 3, shared=0, scoring_func="softmax", parts=0),
    RouteCase(1, 1024, 48, 6, parts=4),
    RouteCase(2, 520, 48, 6, n_group=6, topk_group=2, parts=1),
    RouteCase(4, 300, 64, 64, shared=2, scoring_func="softmax"),
    RouteCase(1, 72, 256, 8, n_group=8, topk_group=4),
    RouteCase(3, 136, 256, 8, scoring_func="softmax", norm_topk_prob=False),
]
EQUAL_SCORES = [
    RouteCase(2, 64, 7, 5),
    RouteCase(2, 64, 40, 30),
    # A program for each expert, of one warp and of two.
    RouteCase(2, 1000, 40, 30),
    RouteCase(2, 1032, 40, 30),
]
EXPERTS = [
    ExpertsCase(1, 96, 40, 5, 3),
    ExpertsCase(2, 264, 33, 4, 2, shared=2, hidden_act="swiglu_of_product"),
    ExpertsCase(3, 64, 16, 5, 5, shared=0),
    ExpertsCase(16, 96, 40, 5, 3),
    ExpertsCase(33, 160, 33, 6, 2, shared=2, hidden_act="swiglu_of_product", used=3),
    ExpertsCase(70, 64, 16, 5, 1, shared=0, used=1),
]
