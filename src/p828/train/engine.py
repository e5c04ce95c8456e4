"""What a training step does to a model, on one device.

The loop calls `forward_backward`, `step`, `tensors` and `load_tensors`, and reads `model`, `device` and `dtype`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import Config, ModelConfig
from p828.data.loader import Batch
from p828.errors import UserError
from p828.model.initialisation import initialise
from p828.model.transformer import Transformer
from p828.train.balance import update_biases
from p828.train.device import compiles, pick_device, pick_dtype, random_states, restore_random_states
from p828.train.gradients import GradientSums
from p828.train.optimizer import Optimizer, pick_moment_dtype


class StepResult(NamedTuple):
    loss: float
    """Mean nats per target over the whole step."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    loads: list[list[int]]
    """Per layer, the tokens that each expert received."""
    applied: bool
    """False when the loss or the gradient was not finite: nothing changed then."""


class PlainEngine:
    """One device: float32 master weights, layers that hold and compute in the run's dtype, AdamW."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        if config.model.attention_backend == "flash" and (self.device.type, self.dtype) == ("cuda", torch.float32):
            raise UserError(
                'model.attention_backend = "flash" computes in bfloat16 on a GPU, not in train.dtype = "float32"'
            )
        if (self.device.type, self.dtype) == ("cuda", torch.bfloat16):
            _check_widths(config.model)
        torch.manual_seed(config.train.seed)  # for dropout; a resume brings the state back
        self.model = Transformer(config.model)
        initialise(self.model, config.train.seed)
        self.model.to(self.device)
        for layer in self.model.layers:
            layer.gradient_checkpointing = config.train.gradient_checkpointing
            layer.auxiliary_losses = bool(config.balance.sequence_loss_weight or config.balance.z_loss_weight)
        if compiles(config.train, self.device):
            for layer in self.model.layers:
                layer.compile()
        self.gradients = GradientSums(self.model, config, self.dtype)
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

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs from here, by file and name."""
        return {
            "model": {**self.model.state_dict(), **self.optimizer.masters()},
            "optimizer": self.optimizer.tensors(),
            "random": random_states(self.device),
        }

    def load_tensors(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_masters(tensors["model"])
        self.optimizer.load_tensors(tensors["optimizer"])
        restore_random_states(tensors["random"], self.device)


def step_result(numbers: list[float], config: Config) -> StepResult:
    """From loss, gradient norm and the loads of all experts, layer by layer."""
    loss, grad_norm, *loads = numbers
    experts = config.model.n_routed_experts
    loads_LE = [[int(n) for n in loads[i : i + experts]] for i in range(0, len(loads), experts)]
    return StepResult(loss, grad_norm, loads_LE, applied=math.isfinite(loss) and math.isfinite(grad_norm))


def _check_widths(model: ModelConfig) -> None:
    """Fused attention and grouped products read 16 bytes at a time. Raises UserError naming the width that is odd."""
    for key in ("head_dim", "hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        if width % 8:
            raise UserError(f"model.{key} = {width}: in bfloat16 on a GPU, a multiple of 8 is accepted")
    if model.head_dim > 256:
        raise UserError(f"model.head_dim = {model.head_dim}: in bfloat16 on a GPU, at most 256 is accepted")
