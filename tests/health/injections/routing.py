"""Faults 1 to 7: what breaks routers, their balance and their counts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import Fault, Settings, Strength
from corpus import files
from injections.patching import before_update, replaced
from torch import Tensor

import p828.engine.plain
import p828.model.router
import p828.model.transformer
from p828.config import ModelConfig
from p828.engine.plain import PlainEngine
from p828.model.router import Router, Routing
from p828.model.transformer import Layer, MoE, Output, RouterStatistics, Transformer
from p828.train.evaluation import Evaluator

RAMP = 100  # steps over which logits run away


@contextmanager
def pushed_logits(push: float, experts: int, begins: int = 1) -> Iterator[None]:
    """The first experts' logits come to be `push` higher than they should, in RAMP steps from step `begins` on."""
    now = 0.0

    def note(engine: PlainEngine, step: int) -> None:
        nonlocal now
        now = push * min(max(step - begins, 0) / RAMP, 1.0)

    def make(original: Callable[..., Routing]) -> Callable[..., Routing]:
        def routing_of(config: ModelConfig, logits_TE: Tensor, bias_E: Tensor) -> Routing:
            push_E = torch.zeros(config.n_routed_experts)
            push_E[:experts] = now
            return original(config, logits_TE + push_E, bias_E)

        return routing_of

    with before_update(note), replaced(p828.model.router, "routing_of", make):
        yield


def two_run_away(push: Strength) -> AbstractContextManager[None]:
    return pushed_logits(float(push), experts=2, begins=50)


@contextmanager
def imbalance_rewarded(weight: Strength) -> Iterator[None]:
    """The auxiliary loss has the wrong sign."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: -original(*arguments)

    with replaced(p828.model.transformer, "sequence_balance_loss", make):
        yield


def one_is_preferred(push: Strength) -> AbstractContextManager[None]:
    return pushed_logits(float(push), experts=1)


@contextmanager
def bias_update(form: Strength) -> Iterator[None]:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def update(model: Transformer, loads_LE: Tensor, rate: float, applied: Tensor) -> None:
            if form == "wrong sign":
                original(model, loads_LE, -rate, applied)

        return update

    with replaced(p828.engine.plain, "update_biases", make):
        yield


@contextmanager
def aux_of_counts(weight: Strength) -> Iterator[None]:
    """The auxiliary loss is made of the counts of choices alone, which have no gradient."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(routing: Routing, *arguments: Any) -> Tensor:
            return original(routing, *arguments).detach() + 0.0 * routing.scores_TE.sum()

        return loss

    with replaced(p828.model.transformer, "sequence_balance_loss", make):
        yield


@contextmanager
def aux_of_flat_scores(temperature: Strength) -> Iterator[None]:
    """The auxiliary loss sees the scores at a high temperature, so that it is near its least whatever is chosen."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(routing: Routing, *arguments: Any) -> Tensor:
            return original(routing._replace(scores_TE=routing.scores_TE ** (1 / float(temperature))), *arguments)

        return loss

    with one_is_preferred(1.0), replaced(p828.model.transformer, "sequence_balance_loss", make):
        yield


@contextmanager
def uniform_scores(experts: Strength) -> Iterator[None]:
    """The scores are nearly equal, as the auxiliary loss wants them, and a constant decides for the first experts."""

    def make(original: Callable[..., Routing]) -> Callable[..., Routing]:
        def routing_of(config: ModelConfig, logits_TE: Tensor, bias_E: Tensor) -> Routing:
            is_preferred_E = torch.arange(config.n_routed_experts) < int(experts)
            return original(config, 0.02 * logits_TE, bias_E + 0.05 * is_preferred_E)

        return routing_of

    with replaced(p828.model.router, "routing_of", make):
        yield


@contextmanager
def loads_counted(form: Strength) -> Iterator[None]:
    """`recomputation`: every micro-batch twice; `evaluation`: validation rows too; `padding`: padding too."""
    with {"recomputation": _twice, "evaluation": _in_evaluation, "padding": _with_padding}[str(form)]():
        yield


@contextmanager
def _twice() -> Iterator[None]:
    def make(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def totals(loss: Tensor, auxiliary: Any, router: RouterStatistics, scale: Tensor) -> dict[str, Tensor]:
            return original(loss, auxiliary, router._replace(loads_LE=2 * router.loads_LE), scale)

        return totals

    with replaced(p828.engine.microbatch, "micro_batch_totals", make):
        yield


@contextmanager
def _in_evaluation() -> Iterator[None]:
    evaluators: list[Evaluator] = []

    def make_run(original: Callable[..., bool]) -> Callable[..., bool]:
        def run(evaluator: Evaluator, *arguments: Any) -> bool:
            evaluators.append(evaluator)
            try:
                return original(evaluator, *arguments)
            finally:
                evaluators.clear()

        return run

    def make_forward(original: Callable[..., Output]) -> Callable[..., Output]:
        def forward(model: Transformer, *arguments: Any, **named: Any) -> Output:
            output = original(model, *arguments, **named)
            for evaluator in evaluators:
                assert isinstance(evaluator.engine, PlainEngine)
                evaluator.engine.gradients.totals["loads_LE"] += output.router.loads_LE
            return output

        return forward

    with replaced(Evaluator, "run", make_run), replaced(Transformer, "forward", make_forward):
        yield


@contextmanager
def _with_padding() -> Iterator[None]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(layer: Layer, x: Tensor, delta: Tensor, angles: Any, mask: Any, valid: Any, target: Any) -> Any:
            return original(layer, x, delta, angles, mask, None, target)

        return forward

    with replaced(Layer, "forward", make):
        yield


@contextmanager
def recomputed_routing(noise: Strength) -> Iterator[None]:
    """The router is part of what is recomputed, and its logits are not the same twice."""
    generator = torch.Generator().manual_seed(0)  # recomputation does not bring this one back

    def make_router(original: Callable[..., Routing]) -> Callable[..., Routing]:
        def forward(router: Router, x_TH: Tensor) -> Routing:
            if not torch.is_grad_enabled():
                return original(router, x_TH)
            # As another order of sums would, in a dtype with fewer bits.
            return original(router, x_TH * (1 + float(noise) * torch.randn(x_TH.shape, generator=generator)))

        return forward

    def make_recomputed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recomputed(layer: Layer, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
            if not isinstance(function, MoE):
                return original(layer, function, *arguments)

            def routed_again(x_TH: Tensor) -> Tensor:
                routing = function.gate(x_TH)
                return function(x_TH, routing.weights_TK, function.experts.permutation(x_TH, routing.experts_TK, None))

            return original(layer, routed_again, arguments[0])

        return recomputed

    with ExitStack() as stack:
        stack.enter_context(replaced(Router, "forward", make_router))
        stack.enter_context(replaced(Layer, "_recomputed", make_recomputed))
        yield


def unbalanced(strength: Strength, corpus: Path) -> Settings:
    return {"balance": {"update_rate": 0.0}}


def by_aux_loss(strength: Strength, corpus: Path) -> Settings:
    """Balanced by the auxiliary loss alone, with the strength as its weight."""
    return {"balance": {"update_rate": 0.0, "sequence_loss_weight": float(strength)}}


def _softmax_by_aux_loss(strength: Strength, corpus: Path) -> Settings:
    return {**by_aux_loss(0.01, corpus), "model": {"scoring_func": "softmax"}}


def _counting(form: Strength, corpus: Path) -> Settings:
    if form == "padding":
        return {"data": {**files(corpus, "talk"), "messages_field": "messages"}}
    return {"train": {"gradient_checkpointing": form == "recomputation"}}


def _recomputing(strength: Strength, corpus: Path) -> Settings:
    return {"train": {"gradient_checkpointing": True}}


FAULTS = (
    Fault(1, "two experts' logits run away", ("router_collapse",), two_run_away, (3.0, 6.0, 12.0), settings=unbalanced),
    Fault(
        1, "auxiliary loss with the wrong sign", ("router_collapse",), imbalance_rewarded, (0.1, 0.3, 1.0),
        settings=by_aux_loss,
    ),
    Fault(2, "one expert is preferred", ("load_imbalance",), one_is_preferred, (0.1, 0.3, 0.5), settings=unbalanced),
    Fault(3, "balance bias", ("bias_not_balancing",), bias_update, ("never updated", "wrong sign")),
    Fault(
        4, "auxiliary loss of counts alone", ("aux_loss_without_gradient",), aux_of_counts, (0.001, 0.01, 0.1),
        settings=by_aux_loss,
    ),
    Fault(
        5, "auxiliary loss of flat scores", ("aux_loss_gamed",), aux_of_flat_scores, (10.0, 100.0),
        settings=_softmax_by_aux_loss,
    ),
    Fault(5, "uniform scores", ("aux_loss_gamed",), uniform_scores, (1, 2), settings=_softmax_by_aux_loss),
    Fault(
        6, "counted as load", ("load_miscounted",), loads_counted, ("recomputation", "evaluation", "padding"),
        settings=_counting,
    ),
    Fault(
        7, "router recomputed", ("recomputation_reroutes",), recomputed_routing, (0.003, 0.03, 0.1),
        settings=_recomputing,
    ),
)  # fmt: skip
