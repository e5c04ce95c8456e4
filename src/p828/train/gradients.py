"""Micro-batches, forward and backward, and the sums of what they give."""

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import BalanceConfig, Config
from p828.data.loader import Batch
from p828.kernels.embedding import add_embedding_gradient_
from p828.model.loss import loss_and_gradients
from p828.model.transformer import RouterStatistics, Transformer
from p828.train.device import compiles
from p828.train.graph import MicroBatchGraphs


class GradientSums:
    """The gradients of a step's micro-batches, summed in float32; their losses and expert loads, likewise.

    Parameters may be float32 or bfloat16. A matrix's gradient of one micro-batch has its parameter's dtype, but for
    the embedding's and the head's: these two stay outside autograd and are summed in float32 from the start. Nothing
    is written to `.grad`, and no hook on a parameter runs.
    """

    def __init__(self, model: Transformer, config: Config, dtype: torch.dtype) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        self.device = model.head_weight.device
        self.sums: dict[Tensor, Tensor] = {
            parameter: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for parameter in model.parameters()
        }
        embedding, head = model.model.embed_tokens.weight, model.head_weight
        self._dembedding_VH = self.sums[embedding]
        self._dhead_VH = self.sums[head]  # the same one if they are tied
        self._by_autograd = [
            parameter for parameter in self.sums if parameter is not embedding and parameter is not head
        ]
        layers, experts = config.model.num_hidden_layers, config.model.n_routed_experts
        self.scale = torch.zeros((), device=self.device)
        """Factor on the losses: 1 / targets of the step. Set before the step's first micro-batch."""
        self.loss = torch.zeros((), device=self.device)
        """Σ loss · scale."""
        self.loads_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)
        self._graphs = MicroBatchGraphs(self._add, self.device) if self._is_recordable() else None
        self._is_first = True  # of the step's micro-batches

    def add(self, batch: Batch) -> None:
        """Add a micro-batch's; does not make the host wait for the device."""
        if self._graphs is None:
            self._add(batch.to(self.device), self._is_first)
        else:
            self._graphs(batch, self._is_first)
        self._is_first = False

    def begin_step(self) -> None:
        """Forget the sums."""
        self._is_first = True
        for total in (self._dembedding_VH, self._dhead_VH, self.loss, self.loads_LE):
            total.zero_()  # the others are written anew by the first micro-batch

    def stop_recording(self) -> None:
        """Start every kernel from the host from now on: only so does a profiler see what each belongs to."""
        self._graphs = None

    def _add(self, batch: Batch, is_first: bool) -> None:
        tokens_T, targets_T = batch.tokens_BS.flatten(), batch.targets_BS.flatten()
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
                hidden_BSH.flatten(0, 1), head_VH, targets_T, self.scale, self._dhead_VH
            )
        auxiliary = auxiliary_losses(output.router, self.config.balance, self.scale)
        dembedded_BSH, *gradients = torch.autograd.grad(
            [hidden_BSH, *auxiliary],
            [embedded_BSH, *self._by_autograd],
            [dhidden_TH.view_as(hidden_BSH), *map(torch.ones_like, auxiliary)],
        )
        with record_function("embedding"):
            add_embedding_gradient_(self._dembedding_VH, tokens_T, dembedded_BSH.flatten(0, 1))
        with record_function("Optimizer.step: accumulate"):
            for parameter, gradient in zip(self._by_autograd, gradients, strict=True):
                if is_first:
                    self.sums[parameter].copy_(gradient)
                else:
                    self.sums[parameter].add_(gradient)
        self.loss += loss * self.scale
        self.loads_LE += output.router.loads_LE

    def _is_recordable(self) -> bool:
        """Whether the host only starts kernels: plain experts ask for loads, recomputation for random states."""
        model, train = self.config.model, self.config.train
        is_fused = self.dtype == torch.bfloat16 and model.attention_backend != "reference" and not model.dropout
        is_compiled = self.device.type == "cuda" and compiles(train, self.device)
        return is_compiled and is_fused and not train.gradient_checkpointing


def auxiliary_losses(router: RouterStatistics, balance: BalanceConfig, scale: Tensor) -> list[Tensor]:
    """The weighted ones that are on, summed over layers and tokens, times `scale`."""
    weighted = ((balance.sequence_loss_weight, router.balance_loss_L), (balance.z_loss_weight, router.z_loss_L))
    return [weight * loss_L.sum() * scale for weight, loss_L in weighted if weight]
