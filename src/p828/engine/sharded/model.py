"""A model whose parameters are views of gathered weights, and what evaluation and samples need of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.distributed.group import ProcessGroup
from p828.engine.sharded.collectives import start_gather
from p828.engine.sharded.weights import ShardedWeights, following
from p828.errors import P828Error
from p828.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return Transformer(config)


def give_parameters(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Make the tensors a model's parameters, without a copy. Buffers stay as they are."""
    # `.data`: autograd does not notice when a buffer gets other weights, which are back by the time it needs them.
    model.load_state_dict({name: tensor.data for name, tensor in tensors.items()}, strict=False, assign=True)


@contextmanager
def gathered_by_layer(model: Transformer, weights: ShardedWeights) -> Iterator[Transformer]:
    """The model for forward passes that gather each layer for its use. All ranks must make equally many.

    The head's weight is there all the time, in memory of its own if it shares a buffer with the embedding.
    """
    with _head_kept(model, weights), _gathering(_uses(weights), [(layer, layer) for layer in model.layers], model):
        yield model


@contextmanager
def gathered_for_any(model: Transformer, weights: ShardedWeights, ranks: ProcessGroup) -> Iterator[Transformer]:
    """The model for forward passes of which each rank makes any number, with layers as they were written.

    Before every pass the ranks agree on it: those that make none of their own gather its layers too, for the others,
    until all ranks have left the block. An error that ends a pass halfway, which no P828Error does, leaves the other
    ranks waiting: it has to end the process.
    """
    uses = _uses(weights)

    def begin(*_: object) -> None:
        ranks.all_reduce([1])

    def help_others() -> None:
        while any(ranks.all_reduce([0])):
            for use in uses:
                use.begin()
                use.end()

    with _head_kept(model, weights):
        try:
            # A decoder calls a layer's modules one by one: the first of them and the last stand for the layer.
            modules = [(layer.input_layernorm, layer.mlp) for layer in model.layers]
            with _gathering(uses, modules, model, begin), _without_copies(model):
                yield model
        except P828Error:
            help_others()
            raise
        help_others()


class _Use(NamedTuple):
    """That a forward pass makes of a unit."""

    weights: ShardedWeights
    number: int
    following: int | None
    """What its buffer is filled with afterwards."""

    def begin(self, *_: object) -> None:
        self.weights.wait(self.number)

    def end(self, *_: object) -> None:
        if self.following is not None:
            self.weights.gather(self.following)


def _uses(weights: ShardedWeights) -> list[_Use]:
    """Embedding and layers in the order of a forward pass, after which there is another one."""
    sequence = [number for number, unit in enumerate(weights.units) if unit.layer is not None or number == 0]
    return list(map(_Use, repeat(weights), sequence, following(sequence, weights.slots)))


@contextmanager
def _gathering(
    uses: Sequence[_Use],
    layers: Sequence[tuple[nn.Module, nn.Module]],
    model: Transformer,
    before_pass: Callable[..., None] = lambda *_: None,
) -> Iterator[None]:
    """The model's forward passes gather what they use. `layers` are the first and the last module of each layer."""
    embedding = model.model.embed_tokens
    hooks = [embedding.register_forward_pre_hook(before_pass)]
    for use, (first, last) in zip(uses, [(embedding, embedding), *layers], strict=True):
        hooks += [first.register_forward_pre_hook(use.begin), last.register_forward_hook(use.end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_copies(model: Transformer) -> Iterator[None]:
    """Nobody takes weights for longer than the layer is at work."""
    model.weights_stay = False
    try:
        yield
    finally:
        model.weights_stay = True


@contextmanager
def _head_kept(model: Transformer, weights: ShardedWeights) -> Iterator[None]:
    """The head's weight is there while the block runs."""
    if model.lm_head is None:
        weights.wait(0)
        yield
    else:
        with _apart(model.lm_head, weights, len(weights.units) - 1):
            yield


@contextmanager
def _apart(head: torch.nn.Module, weights: ShardedWeights, number: int) -> Iterator[None]:
    """The head's weight in memory of its own while the block runs."""
    shared, flat = head.weight, torch.empty_like(weights.flats[number])
    gather = start_gather(flat, weights.shards[number], weights.mesh)
    if gather is not None:
        gather.wait()
    (weight,) = weights.units[number].views(flat).values()
    head.weight = torch.nn.Parameter(weight)
    try:
        yield
    finally:
        head.weight = shared
