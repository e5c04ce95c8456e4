"""A model whose parameters are views of gathered weights, and what evaluation and samples need of it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.engine.sharded.collectives import start_gather
from p828.engine.sharded.weights import ShardedWeights, following
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
def whole_twin(model: Transformer, weights: ShardedWeights) -> Iterator[Transformer]:
    """A model with all weights in memory of its own while the block runs. All ranks must make it at once."""
    twin, state = meta_model(model.config), dict(model.state_dict(keep_vars=True))
    for unit, shard in zip(weights.units, weights.shards, strict=True):
        flat = shard.new_empty(unit.length)
        gather = start_gather(flat, shard, weights.mesh)
        if gather is not None:
            gather.wait()
        state |= unit.views(flat)
    twin.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    twin.frequencies = model.frequencies
    twin.train(model.training)
    yield twin


@contextmanager
def gathered_by_layer(model: Transformer, weights: ShardedWeights) -> Iterator[Transformer]:
    """The model for forward passes that gather each layer for its use. All ranks must make equally many.

    The head's weight is there all the time, in memory of its own if it shares a buffer with the embedding.
    """
    head = len(weights.units) - 1
    sequence = [number for number, unit in enumerate(weights.units) if unit.layer is not None or number == 0]
    after = dict(zip(sequence, following(sequence, weights.slots), strict=True))
    modules = [model.model.embed_tokens, *model.layers]
    with ExitStack() as stack:
        if model.lm_head is None:
            weights.wait(0)
        else:
            stack.enter_context(_apart(model.lm_head, weights, head))
        for number, module in zip(sequence, modules, strict=True):
            hooks = (
                module.register_forward_pre_hook(lambda *_, number=number: weights.wait(number)),
                module.register_forward_hook(lambda *_, number=number: _gather(weights, after[number])),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        yield model


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


def _gather(weights: ShardedWeights, number: int | None) -> None:
    if number is not None:
        weights.gather(number)
