"""What a training step does to a model, on one device.

The loop calls `forward_backward`, `step`, `model_for_evaluation`, `gathered_model`, `tensors` and `load_state_dict`,
and reads `device` and `dtype`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import Config
from p828.data.loader import Batch
from p828.engine.microbatch import GradientAccumulator
from p828.model.backend import check_widths
from p828.model.init import initialise
from p828.model.transformer import Transformer
from p828.optim.adamw import Optimizer, pick_moment_dtype
from p828.optim.balance import update_biases
from p828.runs.tensors import Saveable, Tensors
from p828.system.device import compiles, pick_device, pick_dtype, random_states, restore_random_states


class StepResult(NamedTuple):
    loss: float
    """Mean nats per target over the whole step."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    loads: list[list[int]]
    """Per layer, the tokens that each expert received."""
    applied: bool
    """False when the loss or the gradient was not finite: nothing changed then."""


class Engine(Protocol):
    """What the loop asks of an engine."""

    device: torch.device
    dtype: torch.dtype

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add one micro-batch's gradients, for a step of `num_targets` targets in all, on all ranks."""

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update weights and balance bias, unless something is not finite; begin the next step."""

    def gathered_model(self) -> AbstractContextManager[Transformer]:
        """The model with all its weights, on every rank."""

    def model_for_evaluation(self) -> AbstractContextManager[Transformer]:
        """The model for forward passes that all ranks make at once, each as many."""

    def state_dict(self) -> Mapping[str, Mapping[str, Saveable]]:
        """Everything a checkpoint needs from this rank, by file and name, where it is kept."""

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from what an engine saved."""


class PlainEngine:
    """One device: float32 master weights, layers that hold and compute in the run's dtype, AdamW."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        check_widths(config.model, self.device, self.dtype)
        torch.manual_seed(config.train.seed)  # for dropout; a resume brings the state back
        self.model = _empty_model(config, self.device)
        initialise(self.model, config.train.seed)
        prepare_layers(self.model, config)
        if compiles(config.train, self.device):
            for layer in self.model.layers:
                layer.compile()
        self.gradients = GradientAccumulator(self.model, config, self.dtype)
        moment_dtype = pick_moment_dtype(config.optimizer.moment_dtype, self.dtype, self.device)
        self.optimizer = Optimizer(self.model, config.optimizer, self.dtype, moment_dtype, self.gradients.sums)

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add one micro-batch's gradients, for a step of `num_targets` targets in all."""
        self.gradients.scale.fill_(1 / num_targets)
        self.gradients.add(batch)

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update weights and balance bias, unless something is not finite; begin the next step.

        All of it is started on the device before the host asks what came out.
        """
        with record_function("Optimizer.step"):
            norm = self.optimizer.gradient_norm()
            applied = torch.isfinite(self.gradients.loss) & torch.isfinite(norm)
            self.optimizer.update(learning_rate, norm, applied)
        loss, loads_LE = self.gradients.loss, self.gradients.loads_LE
        update_biases(self.model, loads_LE, self.config.balance.update_rate, applied)
        result = torch.cat([part.double() for part in (loss[None], norm[None], loads_LE.flatten())])
        self.gradients.begin_step()
        return step_result(result.tolist(), self.config)  # the step's one wait for the device

    def state_dict(self) -> dict[str, dict[str, Saveable]]:
        """Everything a checkpoint needs from here, by file and name, where it is kept; masters are not joined."""
        return {
            "model": {**self.model.state_dict(), **self.optimizer.halves()},
            "optimizer": {**self.optimizer.state_dict()},
            "random": {**random_states(self.device)},
        }

    @contextmanager
    def gathered_model(self) -> Iterator[Transformer]:
        yield self.model

    model_for_evaluation = gathered_model

    def load_state_dict(self, tensors: Mapping[str, dict[str, Tensor]] | Tensors) -> None:
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_masters(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        restore_random_states(tensors["random"], self.device)


def _empty_model(config: Config, device: torch.device) -> Transformer:
    """On its device from the start: a large model would take the host most of a minute."""
    if device.type != "cuda":
        return Transformer(config.model)
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device)
    model.reset_buffers(device)
    return model


def step_result(numbers: list[float], config: Config) -> StepResult:
    """From loss, gradient norm and the loads of all experts, layer by layer."""
    loss, grad_norm, *loads = numbers
    experts = config.model.n_routed_experts
    loads_LE = [[int(n) for n in loads[i : i + experts]] for i in range(0, len(loads), experts)]
    return StepResult(loss, grad_norm, loads_LE, applied=math.isfinite(loss) and math.isfinite(grad_norm))


def prepare_layers(model: Transformer, config: Config) -> None:
    for layer in model.layers:
        layer.gradient_checkpointing = config.train.gradient_checkpointing
        layer.auxiliary_losses = bool(config.balance.sequence_loss_weight or config.balance.z_loss_weight)
