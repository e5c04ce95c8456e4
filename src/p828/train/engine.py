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
from p828.kernels.embedding import add_embedding_gradient_
from p828.model.initialisation import initialise
from p828.model.loss import loss_and_gradients
from p828.model.transformer import RouterStatistics, Transformer
from p828.train.balance import update_biases
from p828.train.device import compiles, pick_device, pick_dtype, random_states, restore_random_states
from p828.train.graph import MicroBatchGraphs
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
        moment_dtype = pick_moment_dtype(config.optimizer.moment_dtype, self.dtype, self.device)
        self.optimizer = Optimizer(self.model, config.optimizer, self.dtype, moment_dtype)
        self._dembedding_VH = self.optimizer.gradient_sum(self.model.model.embed_tokens.weight)
        self._dhead_VH = self.optimizer.gradient_sum(self.model.head_weight)  # the same one if they are tied
        for layer in self.model.layers:
            layer.gradient_checkpointing = config.train.gradient_checkpointing
            layer.auxiliary_losses = bool(config.balance.sequence_loss_weight or config.balance.z_loss_weight)
        if compiles(config.train, self.device):
            for layer in self.model.layers:
                layer.compile()
        self._graphs = MicroBatchGraphs(self._forward_backward, self.device) if self._is_recordable() else None
        self._is_first = True  # of the step's micro-batches
        layers, experts = config.model.num_hidden_layers, config.model.n_routed_experts
        self._loss = torch.zeros((), device=self.device)
        self._scale = torch.zeros((), device=self.device)  # of the losses: 1 / targets of the step
        self._loads_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add one micro-batch's gradients, for a step of `num_targets` targets in all."""
        self._scale.fill_(1 / num_targets)
        if self._graphs is None:
            self._forward_backward(batch.to(self.device), self._is_first)
        else:
            self._graphs(batch, self._is_first)
        self._is_first = False

    def stop_recording(self) -> None:
        """Start every kernel from the host from now on: only so does a profiler see what each belongs to."""
        self._graphs = None

    def _forward_backward(self, batch: Batch, is_first: bool) -> None:
        """`forward_backward` of a batch on the device; does not make the host wait."""
        tokens_T, targets_T = batch.tokens_BS.flatten(), batch.targets_BS.flatten()
        # Embedding and head stay outside autograd, so that their gradients are summed in float32 from the start.
        embedded_BSH = self.model.embed(batch.tokens_BS, self.dtype).detach().requires_grad_()
        output = self.model(
            batch.tokens_BS,
            batch.positions_BS,
            batch.document_ids_BS,
            dtype=self.dtype,
            embedded_BSH=embedded_BSH,
        )
        hidden_BSH, head_VH = output.hidden_BSH, self.model.head_weight
        with record_function("CrossEntropy"):  # such labels tell a profiler what autograd does not
            loss, dhidden_TH = loss_and_gradients(
                hidden_BSH.flatten(0, 1), head_VH, targets_T, self._scale, self._dhead_VH
            )
        auxiliary = self._auxiliary_losses(output.router)
        torch.autograd.backward(
            [hidden_BSH, *auxiliary], [dhidden_TH.view_as(hidden_BSH), *map(torch.ones_like, auxiliary)]
        )
        assert embedded_BSH.grad is not None
        with record_function("embedding"):
            add_embedding_gradient_(self._dembedding_VH, tokens_T, embedded_BSH.grad.flatten(0, 1))
        with record_function("Optimizer.step: accumulate"):
            self.optimizer.accumulate(is_first)
        self._loss += loss * self._scale
        self._loads_LE += output.router.loads_LE

    def _is_recordable(self) -> bool:
        """Whether the host only starts kernels: plain experts ask for loads, recomputation for random states."""
        model, train = self.config.model, self.config.train
        is_fused = self.dtype == torch.bfloat16 and model.attention_backend != "reference" and not model.dropout
        is_compiled = self.device.type == "cuda" and compiles(train, self.device)
        return is_compiled and is_fused and not train.gradient_checkpointing

    def _auxiliary_losses(self, router: RouterStatistics) -> list[Tensor]:
        balance = self.config.balance
        weighted = ((balance.sequence_loss_weight, router.balance_loss_L), (balance.z_loss_weight, router.z_loss_L))
        return [weight * loss_L.sum() * self._scale for weight, loss_L in weighted if weight]

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update weights and balance bias, unless something is not finite; begin the next step.

        All of it is started on the device before the host asks what came out.
        """
        with record_function("Optimizer.step"):
            norm = self.optimizer.gradient_norm()
            applied = torch.isfinite(self._loss) & torch.isfinite(norm)
            self.optimizer.update(learning_rate, norm, applied)
        update_biases(self.model, self._loads_LE, self.config.balance.update_rate, applied)
        result = torch.cat([part.double() for part in (self._loss[None], norm[None], self._loads_LE.flatten())])
        self._begin_step()
        loss, grad_norm, *loads = result.tolist()  # the step's one wait for the device
        experts = self.config.model.n_routed_experts
        loads_LE = [[int(n) for n in loads[i : i + experts]] for i in range(0, len(loads), experts)]
        return StepResult(loss, grad_norm, loads_LE, applied=math.isfinite(loss) and math.isfinite(grad_norm))

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

    def _begin_step(self) -> None:
        self.optimizer.begin_step()
        self._is_first = True
        self._loss.zero_()
        self._loads_LE.zero_()


def _check_widths(model: ModelConfig) -> None:
    """Fused attention and grouped products read 16 bytes at a time. Raises UserError naming the width that is odd."""
    for key in ("head_dim", "hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        if width % 8:
            raise UserError(f"model.{key} = {width}: in bfloat16 on a GPU, a multiple of 8 is accepted")
    if model.head_dim > 256:
        raise UserError(f"model.head_dim = {model.head_dim}: in bfloat16 on a GPU, at most 256 is accepted")
