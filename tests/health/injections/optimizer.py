"""Fault 25: an optimizer that does not do what it says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import Fault, Settings, Strength
from injections.patching import after_update, before_update, gradients_of, replaced, update_copies

from p828.engine.plain import PlainEngine
from p828.optim.adamw import AdamW


@contextmanager
def forgotten_parameters(part: Strength) -> Iterator[None]:
    """The optimizer does not hold the parameters of a part."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_optimizer(engine: PlainEngine) -> Any:
            optimizer = original(engine)
            assert isinstance(optimizer, AdamW)
            left_out = {parameter for name, parameter in engine.model.named_parameters() if str(part) in name}
            update_copies(optimizer, left_out)
            return optimizer

        return make_optimizer

    with replaced(PlainEngine, "_make_optimizer", make):
        yield


@contextmanager
def without_low_bits(rate: Strength) -> Iterator[None]:
    """What float32 masters have beyond bfloat16 is dropped after every update."""

    def drop(engine: PlainEngine, step: int) -> None:
        for master in engine.masters.by_parameter.values():
            master.low_bits.zero_()

    with after_update(drop):
        yield


@contextmanager
def no_gradient(part: Strength) -> Iterator[None]:
    def zero(engine: PlainEngine, step: int) -> None:
        for gradient in gradients_of(engine, str(part)):
            gradient.zero_()

    with before_update(zero):
        yield


def _bfloat16(rate: Strength, corpus: Path) -> Settings:
    return {"train": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": float(rate)}}


def _eps(eps: Strength, corpus: Path) -> Settings:
    return {"optimizer": {"eps": float(eps)}}


FAULTS = (
    Fault(
        25, "a part that the optimizer does not hold", ("frozen_part",), forgotten_parameters,
        ("mlp.gate", "self_attn", "embed_tokens"),
    ),
    Fault(
        25, "bfloat16 weights without masters", ("updates_lost",), without_low_bits, (1e-4, 3e-4), settings=_bfloat16
    ),
    Fault(25, "no gradient for", ("no_gradient",), no_gradient, ("sinks", "mlp.gate")),
    Fault(25, "eps too large", ("update_ratio",), strengths=(0.03, 1.0), settings=_eps),
)  # fmt: skip
