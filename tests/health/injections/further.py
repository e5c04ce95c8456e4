"""Ten faults beyond the list."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from cases import STRIKES_AT, Fault, Strength
from corpus import VOCABULARY
from injections.data import changed_batches
from injections.patching import before_update, replaced
from torch import Tensor

import p828.data.loader
import p828.engine.plain
import p828.model.router
import p828.optim.adamw
import p828.train.build
from p828.data.batch import Batch
from p828.engine.microbatch import GradientAccumulator
from p828.engine.plain import PlainEngine
from p828.model.router import Routing
from p828.model.transformer import Transformer

MICRO_BATCHES = 2  # of a step


def _is_struck(number: int) -> bool:
    """Whether a micro-batch is of a step from the middle on."""
    return number > MICRO_BATCHES * (STRIKES_AT - 1)


@contextmanager
def other_tokenizer(share: Strength) -> Iterator[None]:
    """From the middle on a share of the ids means other words, as with a tokenizer that was trained again."""
    generator = torch.Generator().manual_seed(1)
    is_other_V = torch.rand(VOCABULARY, generator=generator) < float(share)
    ids_V = torch.where(is_other_V, torch.randperm(VOCABULARY, generator=generator), torch.arange(VOCABULARY))

    def change(batch: Batch, number: int) -> Batch:
        if not _is_struck(number):
            return batch
        return replace(batch, tokens_BS=ids_V[batch.tokens_BS], targets_BS=ids_V[batch.targets_BS])

    with changed_batches(change):
        yield


@contextmanager
def forgotten_micro_batch(strength: Strength) -> Iterator[None]:
    """The last micro-batch of each step adds nothing."""
    added = 0

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def add(gradients: GradientAccumulator, *arguments: Any) -> None:
            nonlocal added
            added += 1
            if added % MICRO_BATCHES:
                original(gradients, *arguments)

        return add

    with replaced(GradientAccumulator, "add", make):
        yield


@contextmanager
def unclipped_large_gradients(factor: Strength) -> Iterator[None]:
    def scale(engine: PlainEngine, step: int) -> None:
        for gradient in engine.gradients.sums.values():
            gradient *= float(factor)

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda norm, max_norm: torch.ones_like(norm)

    with before_update(scale), replaced(p828.optim.adamw, "clip_factor", make):
        yield


@contextmanager
def targets_not_shifted(strength: Strength) -> Iterator[None]:
    """In training, a token's target is the token itself."""
    with changed_batches(lambda batch, number: replace(batch, targets_BS=batch.tokens_BS)):
        yield


@contextmanager
def shard_of_noise(steps: Strength) -> Iterator[None]:
    """Some steps' rows are random ids, as of a file that is no text; sound rows follow."""

    def change(batch: Batch, number: int) -> Batch:
        if not _is_struck(number) or _is_struck(number - MICRO_BATCHES * int(steps)):
            return batch
        tokens_BS = torch.randint(0, VOCABULARY, batch.tokens_BS.shape)
        return replace(batch, tokens_BS=tokens_BS, targets_BS=tokens_BS.roll(-1, dims=1))

    with changed_batches(change):
        yield


@contextmanager
def shard_of_one_row(strength: Strength) -> Iterator[None]:
    """From the middle on every row is the same text."""
    kept: list[Any] = []

    def make(original: Callable[..., Batch]) -> Callable[..., Batch]:
        made = 0

        def make_batch(samples: Any, *arguments: Any) -> Batch:
            nonlocal made
            made += 1
            kept.extend(samples[:1] if not kept else [])
            return original(kept[:1] * len(samples) if _is_struck(made) else samples, *arguments)

        return make_batch

    with replaced(p828.data.loader, "make_batch", make):
        yield


@contextmanager
def warm_up_again(strength: Strength) -> Iterator[None]:
    """A resume begins the schedule again."""

    def make(original: Callable[..., float]) -> Callable[..., float]:
        first: list[int] = []

        def rate(step: int, **named: Any) -> float:
            first.append(step)
            return original(step - first[0], **named)

        return rate

    with replaced(p828.train.build, "learning_rate", make):
        yield


@contextmanager
def detached_router(strength: Strength) -> Iterator[None]:
    """The experts' weights reach the router without a gradient."""

    def make(original: Callable[..., Routing]) -> Callable[..., Routing]:
        def routing_of(*arguments: Any) -> Routing:
            routing = original(*arguments)
            return routing._replace(weights_TK=routing.weights_TK.detach() + 0.0 * routing.weights_TK)

        return routing_of

    with replaced(p828.model.router, "routing_of", make):
        yield


@contextmanager
def hasty_balance(times: Strength) -> Iterator[None]:
    """The balance bias moves so far a step that it swings from one side to the other."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def update(model: Transformer, loads_LE: Tensor, rate: float, applied: Tensor) -> None:
            original(model, loads_LE, rate * float(times), applied)

        return update

    with replaced(p828.engine.plain, "update_biases", make):
        yield


@contextmanager
def same_rows_on_all_ranks(strength: Strength) -> Iterator[None]:
    """Every micro-batch of a step is the first one again, as where ranks do not share the data out."""
    kept: list[Batch] = []

    def change(batch: Batch, number: int) -> Batch:
        if number % MICRO_BATCHES == 1:
            kept[:] = [batch]
        return kept[0]

    with changed_batches(change):
        yield


FAULTS = (
    Fault(
        26, "another tokenizer", ("spike_unrecovered", "divergence"), other_tokenizer, (0.3, 1.0),
        strikes_at=STRIKES_AT,
    ),
    Fault(27, "forgotten micro-batch", ("loss_normalisation",), forgotten_micro_batch),
    Fault(28, "large gradients, not clipped", ("large_gradient_norm",), unclipped_large_gradients, (8.0, 50.0)),
    Fault(29, "targets not shifted", ("validation_gap",), targets_not_shifted),
    Fault(30, "steps of noise", ("spike", "spike_unrecovered"), shard_of_noise, (2, 6), strikes_at=STRIKES_AT),
    Fault(31, "a shard of one row", ("data_repeats",), shard_of_one_row, strikes_at=STRIKES_AT),
    Fault(
        32, "schedule begins again after a resume", ("schedule_restart",), warm_up_again, is_resumed=True,
        strikes_at=STRIKES_AT,
    ),
    Fault(33, "detached router", ("no_gradient",), detached_router),
    Fault(
        34, "hasty balance bias", ("load_imbalance", "router_collapse", "bias_not_balancing"), hasty_balance,
        (30.0, 100.0),
    ),
    Fault(35, "same rows on all ranks", ("data_repeats",), same_rows_on_all_ranks),
)  # fmt: skip
