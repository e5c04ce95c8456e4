"""What a training step does to a model, on one device.

The loop calls `forward_backward`, `step`, `tensors` and `load_tensors`, and reads `model`, `device` and `dtype`.
"""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from p828.config import Config, ModelConfig
from p828.data.loader import Batch
from p828.errors import UserError
from p828.model.initialisation import initialise
from p828.model.loss import chunk_loss_and_gradients, linear_cross_entropy
from p828.model.transformer import Transformer, cumulative_lengths
from p828.train.balance import update_biases
from p828.train.device import compiles, pick_device, pick_dtype, random_states, restore_random_states
from p828.train.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors


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
    """One device: float32 master weights, layers computed in the run's dtype, AdamW."""

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
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.chunk_gradients = chunk_loss_and_gradients
        for layer in self.model.layers:
            layer.gradient_checkpointing = config.train.gradient_checkpointing
        if compiles(config.train, self.device):
            # Advice to round float32 products to TF32; the router is to stay in float32.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            self.chunk_gradients = torch.compile(chunk_loss_and_gradients)
            for layer in self.model.layers:
                layer.compile()
        self._begin_step()

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add one micro-batch's gradients, for a step of `num_targets` targets in all."""
        # Where documents start is known on the host; found on the device it would make the host wait.
        cu_seqlens = cumulative_lengths(batch.positions_BS).to(self.device, non_blocking=True)
        batch = batch.to(self.device)
        output = self.model(
            batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, cu_seqlens=cu_seqlens, dtype=self.dtype
        )
        hidden_TH, targets_T = output.hidden_BSH.flatten(0, 1), batch.targets_BS.flatten()
        loss = linear_cross_entropy(hidden_TH, self.model.head_weight, targets_T, self.chunk_gradients) / num_targets
        self._loss += loss.detach()
        balance = self.config.balance
        if balance.sequence_loss_weight:
            loss = loss + balance.sequence_loss_weight * output.router.balance_loss_L.sum() / num_targets
        if balance.z_loss_weight:
            loss = loss + balance.z_loss_weight * output.router.z_loss_L.sum() / num_targets
        loss.backward()
        self._loads_LE += output.router.loads_LE

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update weights and balance bias, unless something is not finite; begin the next step."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        loss, grad_norm, loads = self._read(norm)
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            update_biases(self.model, self._loads_LE, self.config.balance.update_rate)
        result = StepResult(loss, grad_norm, loads, applied)
        self._begin_step()
        return result

    def _read(self, norm: Tensor) -> tuple[float, float, list[list[int]]]:
        """Loss, gradient norm and loads on the host, in one transfer: the step's one wait for the device."""
        parts = (self._loss[None], norm[None], self._loads_LE.flatten())
        loss, grad_norm, *loads = torch.cat([part.double() for part in parts]).tolist()
        experts = self.config.model.n_routed_experts
        return loss, grad_norm, [[int(n) for n in loads[i : i + experts]] for i in range(0, len(loads), experts)]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs from here, by file and name."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "random": random_states(self.device),
        }

    def load_tensors(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
        restore_random_states(tensors["random"], self.device)

    def _begin_step(self) -> None:
        model = self.config.model
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = torch.zeros((), device=self.device)
        self._loads_LE = torch.zeros(
            model.num_hidden_layers, model.n_routed_experts, dtype=torch.int64, device=self.device
        )


def _check_widths(model: ModelConfig) -> None:
    """Fused attention and grouped products read 16 bytes at a time. Raises UserError naming the width that is odd."""
    for key in ("head_dim", "hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        if width % 8:
            raise UserError(f"model.{key} = {width}: in bfloat16 on a GPU, a multiple of 8 is accepted")
    if model.head_dim > 256:
        raise UserError(f"model.head_dim = {model.head_dim}: in bfloat16 on a GPU, at most 256 is accepted")
