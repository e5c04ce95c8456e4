"""One optimizer step of p828, and the interface that a peer's has, too."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from p828.bench.batches import random_batches
from p828.bench.peers import peer_step
from p828.bench.routing import GivenRouter, balanced_experts, random_experts
from p828.bench.systems import System
from p828.config import Config
from p828.data.batch import Batch
from p828.engine.plain import PlainEngine


class Step(Protocol):
    device: torch.device
    model: nn.Module

    def run(self) -> None:
        """All micro-batches of a step and the update."""

    def run_traceably(self) -> None:
        """The same, with every kernel started from the host by the operation that it belongs to."""

    def moments_dtype(self) -> torch.dtype:
        """What the optimizer keeps most of its state in."""


class OwnStep:
    """What the training loop does."""

    def __init__(self, config: Config, routing: str) -> None:
        self.engine = PlainEngine(config)
        self.device = self.engine.device
        self.model: nn.Module = self.engine.model
        for layer, experts_TK in zip(self.engine.model.layers, given_experts(config, routing), strict=False):
            layer.mlp.gate = GivenRouter(layer.mlp.gate, experts_TK.to(self.device))
        self.accumulation, self.learning_rate = config.train.gradient_accumulation, config.optimizer.learning_rate
        self.batches = rotate(random_batches(config, self.device))

    def run(self) -> None:
        batches = [next(self.batches) for _ in range(self.accumulation)]
        num_targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            self.engine.forward_backward(batch, num_targets)
        self.engine.step(self.learning_rate)

    def run_traceably(self) -> None:
        self.engine.gradients.stop_capturing()
        self.run()

    def moments_dtype(self) -> torch.dtype:
        return most_common_dtype(self.engine.optimizer.state_dict().values())


def build_step(system: System, routing: str, benchmarks: Path | None = None) -> Step:
    """p828's, or a peer's, whose code is in the repository's `benchmarks`."""
    if benchmarks is None:
        return OwnStep(system.config, routing)
    step: Step = peer_step(system, routing, benchmarks)
    return step


def given_experts(config: Config, routing: str) -> Iterator[Tensor]:
    """A (T, K) choice for each layer; nothing for routing `model`."""
    if routing == "model":
        return
    generator = torch.Generator().manual_seed(config.train.seed)
    choose = random_experts if routing == "random" else balanced_experts
    tokens = config.train.micro_batch_size * config.data.sequence_length
    for _ in range(config.model.num_hidden_layers):
        yield choose(tokens, config.model.n_routed_experts, config.model.num_experts_per_tok, generator)


def rotate(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def most_common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of most numbers."""
    numbers: dict[torch.dtype, int] = {}
    for tensor in tensors:
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype])
