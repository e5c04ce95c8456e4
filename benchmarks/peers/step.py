"""A plain training loop around another library's model: fused AdamW, and clipping."""

import importlib
import itertools

import torch
from torch import nn

from p828.bench.batches import random_batches
from p828.bench.step import given_experts, most_common_dtype
from p828.bench.systems import System
from p828.config import OptimizerConfig
from p828.system.device import pick_device
from peers.interface import Peer


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with a configuration's settings, for all of a model's parameters."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class PeerStep:
    """An optimizer step of `gradient_accumulation` micro-batches; a `p828.bench.step.Step`."""

    def __init__(self, system: System, routing: str) -> None:
        config = system.config
        self.device = pick_device(config.train.device)
        torch.manual_seed(config.train.seed)
        build = importlib.import_module(f"peers.{system.framework}_model").build
        self.peer: Peer = build(system, self.device, list(given_experts(config, routing)))
        self.model = self.peer.model
        self.optimizer = adamw(self.model, config.optimizer)
        self.accumulation, self.max_grad_norm = config.train.gradient_accumulation, config.optimizer.max_grad_norm
        self.batches = itertools.cycle([batch.to(self.device) for batch in random_batches(config, self.device)])
        tokens = config.train.micro_batch_size * config.data.sequence_length
        self.num_targets = torch.tensor(self.accumulation * tokens, device=self.device)

    def run(self) -> None:
        for _ in range(self.accumulation):
            batch = next(self.batches)
            self.peer.forward_backward(batch.tokens_BS, batch.targets_BS, self.num_targets)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.peer.has_cuda_graph)

    def run_traceably(self) -> None:
        self.run()

    def moments_dtype(self) -> torch.dtype:
        """What the optimizer keeps most of its state in."""
        return most_common_dtype(value for state in self.optimizer.state.values() for value in state.values())
