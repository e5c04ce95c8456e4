"""Replacing one function of the real code for a while."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from p828.engine.interface import StepResult
from p828.engine.plain import PlainEngine
from p828.optim.adamw import AdamW


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is what `make` returns for the original, until the end."""
    original = owner.__dict__[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def before_update(change: Callable[[PlainEngine, int], None]) -> Iterator[None]:
    """`change(engine, step)` once the gradients of each step are summed; steps count from 1 at this start."""
    with _around_step(change, lambda engine, step: None):
        yield


@contextmanager
def after_update(change: Callable[[PlainEngine, int], None]) -> Iterator[None]:
    with _around_step(lambda engine, step: None, change):
        yield


@contextmanager
def _around_step(
    before: Callable[[PlainEngine, int], None], after: Callable[[PlainEngine, int], None]
) -> Iterator[None]:
    def make(original: Callable[..., StepResult]) -> Callable[..., StepResult]:
        steps = 0

        def step(engine: PlainEngine, *arguments: Any, **named: Any) -> StepResult:
            nonlocal steps
            steps += 1
            with torch.no_grad():
                before(engine, steps)
                result = original(engine, *arguments, **named)
                after(engine, steps)
            return result

        return step

    with replaced(PlainEngine, "step", make):
        yield


def gradients_of(engine: PlainEngine, *parts: str) -> list[Tensor]:
    """The step's sums of the gradients of parameters that have one of `parts` in their names."""
    named = engine.model.named_parameters()
    return [engine.gradients.sums[p] for name, p in named if any(part in name for part in parts)]


def weights_of(engine: PlainEngine, *parts: str) -> list[Tensor]:
    return [p for name, p in engine.model.named_parameters() if any(part in name for part in parts)]


def update_copies(optimizer: AdamW, parameters: Collection[Tensor]) -> None:
    """From now on the optimizer updates copies of these, and not what the model computes with."""
    optimizer._groups = [
        group._replace(parameters=[p.detach().clone() if p in parameters else p for p in group.parameters])
        for group in optimizer._groups
    ]


EXPERTS = ("mlp.experts.",)
ROUTER = ("mlp.gate.",)
SINKS = ("sinks",)
ATTENTION = ("_proj.weight",)
