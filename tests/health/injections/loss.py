"""Faults 8 to 13: what breaks the loss and the gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import STRIKES_AT, Fault, Settings, Strength
from corpus import files
from injections.patching import EXPERTS, after_update, before_update, gradients_of, replaced, weights_of
from torch import Tensor

import p828.engine.microbatch
import p828.engine.plain
from p828.data.batch import Batch
from p828.engine.plain import PlainEngine

BAD_UPDATE_AT = 160


@contextmanager
def growing_weights(rate: Strength) -> Iterator[None]:
    """Weight decay with the wrong sign, as it were: from the middle on all matrices grow by `rate` a step."""

    def grow(engine: PlainEngine, step: int) -> None:
        if step >= STRIKES_AT:
            for weight in weights_of(engine, "proj", "lm_head"):
                weight *= 1 + float(rate)

    with after_update(grow):
        yield


@contextmanager
def noisy_updates(noise: Strength) -> Iterator[None]:
    """From the middle on every update adds noise of `noise` times the weight's own spread."""

    def add(engine: PlainEngine, step: int) -> None:
        if step >= STRIKES_AT:
            for weight in weights_of(engine, "proj"):
                weight += float(noise) * weight.std() * torch.randn(weight.shape)

    with after_update(add):
        yield


@contextmanager
def bad_update(size: Strength) -> Iterator[None]:
    """One update changes every matrix of the layers by `size` times its own spread."""

    def add(engine: PlainEngine, step: int) -> None:
        if step == BAD_UPDATE_AT:
            for weight in weights_of(engine, "proj"):
                weight += float(size) * weight.std() * torch.randn(weight.shape)

    with after_update(add):
        yield


@contextmanager
def nan_loss(steps: Strength) -> Iterator[None]:
    """The loss of some steps is NaN, and so are its gradients."""
    now = 0

    def count(engine: PlainEngine, step: int) -> None:
        nonlocal now
        now = step

    def make(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def loss_and_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
            loss, gradient = original(*arguments)
            is_bad = STRIKES_AT <= now + 1 < STRIKES_AT + int(steps)
            return (loss * torch.nan, gradient * torch.nan) if is_bad else (loss, gradient)

        return loss_and_gradients

    with before_update(count), replaced(p828.engine.microbatch, "loss_and_gradients", make):
        yield


@contextmanager
def infinite_gradient_applied(part: Strength) -> Iterator[None]:
    """A number of a gradient is infinite, and neither the norm nor the update minds."""

    def spoil(engine: PlainEngine, step: int) -> None:
        if step == STRIKES_AT:
            gradients_of(engine, str(part))[0].view(-1)[0] = torch.inf

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda norms_P: original(norms_P.nan_to_num(nan=0.0, posinf=0.0))

    with before_update(spoil), replaced(p828.engine.plain, "global_norm", make):
        yield


@contextmanager
def scaled_expert_gradients(factor: Strength) -> Iterator[None]:
    def scale(engine: PlainEngine, step: int) -> None:
        for gradient in gradients_of(engine, *EXPERTS):
            gradient *= float(factor)

    with before_update(scale):
        yield


@contextmanager
def norm_without_experts(strength: Strength) -> Iterator[None]:
    """The norm by which gradients are clipped leaves the routed experts out, as where each rank has some of them."""
    is_counted: list[bool] = []

    def find(engine: PlainEngine, step: int) -> None:
        names = (name for name, _ in engine.model.named_parameters())
        is_counted[:] = [not any(part in name for part in EXPERTS) for name in names]

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda norms_P: original(norms_P[torch.tensor(is_counted)])

    with before_update(find), replaced(p828.engine.plain, "global_norm", make):
        yield


@contextmanager
def wrong_denominator(form: Strength) -> Iterator[None]:
    """`sum of means`: each micro-batch's own mean is added; `mean of means`: their mean, though targets differ."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def forward_backward(engine: PlainEngine, batch: Batch, num_targets: int) -> None:
            micro_batches = 1 if str(form).startswith("sum") else engine.config.train.gradient_accumulation
            original(engine, batch, max(batch.num_targets, 1) * micro_batches)

        return forward_backward

    with replaced(PlainEngine, "forward_backward", make):
        yield


def _accumulating(form: Strength, corpus: Path) -> Settings:
    talk = {"data": {**files(corpus, "talk"), "messages_field": "messages"}}
    return {
        "train": {"gradient_accumulation": 4, "micro_batch_size": 2},
        **(talk if form == "mean of means" else {}),
    }


FAULTS = (
    Fault(8, "weights grow", ("divergence",), growing_weights, (0.01, 0.02, 0.04), strikes_at=STRIKES_AT),
    Fault(8, "noise in every update", ("divergence",), noisy_updates, (0.2, 0.25), strikes_at=STRIKES_AT),
    Fault(9, "one bad update", ("spike_unrecovered",), bad_update, (2.0, 3.0, 4.0), strikes_at=BAD_UPDATE_AT),
    Fault(10, "NaN in the loss", ("non_finite",), nan_loss, (1, 2, 5), strikes_at=STRIKES_AT),
    Fault(
        11, "infinite gradient applied", ("non_finite_applied",), infinite_gradient_applied,
        ("embed_tokens", "mlp.gate", "experts.down_proj"), strikes_at=STRIKES_AT,
    ),
    Fault(12, "experts' gradients scaled", ("expert_gradient_norm",), scaled_expert_gradients, (1 / 64, 16.0, 64.0)),
    Fault(12, "norm without experts", ("expert_gradient_norm",), norm_without_experts),
    Fault(
        13, "wrong denominator", ("loss_normalisation",), wrong_denominator,
        ("sum of means", "mean of means"), settings=_accumulating,
    ),
)  # fmt: skip
