"""Faults 18 and 19: learning rates, and resumes that train nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import STRIKES_AT, Fault, Settings, Strength
from injections.patching import replaced, update_copies

import p828.train.build
from p828.engine.plain import PlainEngine
from p828.optim.adamw import AdamW


@contextmanager
def restarted(every: Strength) -> Iterator[None]:
    """The schedule begins again every so many steps."""

    def make(original: Callable[..., float]) -> Callable[..., float]:
        return lambda step, **named: original(step % int(every), **named)

    with replaced(p828.train.build, "learning_rate", make):
        yield


@contextmanager
def scaled_rate(factor: Strength) -> Iterator[None]:
    """The optimizer is given another rate than the schedule's, which is recorded."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda optimizer, rate, *arguments: original(optimizer, rate * float(factor), *arguments)

    with replaced(AdamW, "update", make):
        yield


@contextmanager
def nothing_trained(form: Strength) -> Iterator[None]:
    """After the resume the optimizer updates copies of the weights, or has a rate of 0."""

    def make_load(original: Callable[..., None]) -> Callable[..., None]:
        def load(engine: PlainEngine, *arguments: Any) -> None:
            original(engine, *arguments)
            assert isinstance(engine.optimizer, AdamW)
            update_copies(engine.optimizer, {*engine.model.parameters()})

        return load

    def make_update(original: Callable[..., None]) -> Callable[..., None]:
        return lambda optimizer, rate, *arguments: original(optimizer, 0.0, *arguments)

    is_copied = form == "copies"
    with replaced(PlainEngine, "load_state_dict", make_load) if is_copied else replaced(AdamW, "update", make_update):
        yield


def _no_warmup(rate: Strength, corpus: Path) -> Settings:
    return {"schedule": {"warmup_steps": 0}, "optimizer": {"learning_rate": float(rate)}}


def _rate(rate: Strength, corpus: Path) -> Settings:
    return {"optimizer": {"learning_rate": float(rate)}}


FAULTS = (
    Fault(18, "schedule restarts", ("schedule_restart",), restarted, (60, 100, 180)),
    Fault(18, "no warm-up", ("no_warmup",), strengths=(3e-3, 1e-2, 2e-2), settings=_no_warmup),
    Fault(18, "rate too high", ("learning_rate_high",), strengths=(0.09, 0.3), settings=_rate),
    Fault(18, "rate too low", ("learning_rate_low",), strengths=(3e-6, 3e-5), settings=_rate),
    Fault(18, "rate scaled in the optimizer", ("learning_rate_high", "update_ratio"), scaled_rate, (30.0,)),
    Fault(
        19, "resume that trains nothing", ("resume_without_training",), nothing_trained, ("copies", "rate 0"),
        is_resumed=True, strikes_at=STRIKES_AT,
    ),
)  # fmt: skip
