"""Micro-batches, forward and backward, and the sums of what they give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import BalanceConfig, Config
from p828.data.batch import Batch
from p828.engine.cuda_graph import CudaGraphRunner
from p828.kernels.embedding import add_embedding_gradient_
from p828.model.loss import IGNORE, loss_and_gradients
from p828.model.transformer import RouterStatistics, Transformer
from p828.system.device import compiles


class GradientAccumulator:
    """The gradients of a step's micro-batches, summed in float32; their losses and expert loads, likewise.

    Parameters may be float32 or bfloat16. A matrix's gradient of one micro-batch has its parameter's dtype, but for
    the embedding's and the head's: these two stay outside autograd and are summed in float32 from the start. Nothing
    is written to `.grad`, and no hook on a parameter runs.

    The backward pass may go in several segments of layers, so that the sums of the last layers can be used while those
    of the first ones are still computed.
    """

    def __init__(
        self,
        model: Transformer,
        config: Config,
        dtype: torch.dtype,
        sums: Mapping[Tensor, Tensor] | None = None,
        segments: int = 1,
    ) -> None:
        """`sums` is where every parameter's sum is to be, if that matters."""
        self.model, self.config, self.dtype = model, config, dtype
        self.device = model.head_weight.device
        self.sums: Mapping[Tensor, Tensor] = sums or {
            parameter: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for parameter in model.parameters()
        }
        self._dembedding_VH = self.sums[model.model.embed_tokens.weight]
        self._dhead_VH = self.sums[model.head_weight]  # the same one if they are tied
        balance = config.balance
        has_auxiliary_losses = bool(balance.sequence_loss_weight or balance.z_loss_weight)  # they reach all layers
        self._segments = _segments(model, 1 if has_auxiliary_losses else segments)
        layers, experts = config.model.num_hidden_layers, config.model.n_routed_experts
        self.scale = torch.zeros((), device=self.device)
        """Factor on the losses: 1 / targets of the step. Set before the step's first micro-batch."""
        self.loss = torch.zeros((), device=self.device)
        """Σ loss · scale."""
        self.loads_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)
        self._graphs = CudaGraphRunner(self._add, len(self._segments), self.device) if self._is_recordable() else None
        self._is_first = True  # of the step's micro-batches

    def add(self, batch: Batch, when_added: Callable[[list[Tensor]], None] = lambda parameters: None) -> None:
        """Add a micro-batch's; does not make the host wait for the device.

        After each segment, `when_added` gets the parameters to whose sums the device will have added by then.
        """
        if self._graphs is None:
            added = self._add(batch.to(self.device), self._is_first)
        else:
            added = self._graphs(batch, self._is_first)
        for parameters in added:
            when_added(parameters)
        self._is_first = False

    def begin_step(self) -> None:
        """Forget the sums."""
        self._is_first = True
        for total in (self._dembedding_VH, self._dhead_VH, self.loss, self.loads_LE):
            total.zero_()  # the others are written anew by the first micro-batch

    def stop_recording(self) -> None:
        """Start every kernel from the host from now on: only so does a profiler see what each belongs to."""
        self._graphs = None

    def _add(self, batch: Batch, is_first: bool) -> Iterator[list[Tensor]]:
        tokens_T, targets_T = batch.tokens_BS.flatten(), batch.targets_BS.flatten()
        embedded_BSH = self.model.embed(batch.tokens_BS, self.dtype).detach().requires_grad_()
        output = self.model(
            batch.tokens_BS,
            batch.positions_BS,
            batch.document_ids_BS,
            dtype=self.dtype,
            embedded_BSH=embedded_BSH,
            detach_before=[segment.first_layer for segment in self._segments[1:]],
            valid_BS=batch.targets_BS != IGNORE,
        )
        with record_function("CrossEntropy"):  # such labels tell a profiler what autograd does not
            loss, dhidden_TH = loss_and_gradients(
                output.hidden_BSH.flatten(0, 1), self.model.head_weight, targets_T, self.scale, self._dhead_VH
            )
        self.loss += loss * self.scale
        self.loads_LE += output.router.loads_LE
        auxiliary = auxiliary_losses(output.router, self.config.balance, self.scale)
        outputs: Sequence[Tensor] = [output.hidden_BSH, *auxiliary]
        gradients: Sequence[Tensor] = [dhidden_TH.view_as(output.hidden_BSH), *map(torch.ones_like, auxiliary)]
        boundaries = output.boundaries
        del output
        for number in reversed(range(len(self._segments))):
            segment = self._segments[number]
            outputs_before, into = boundaries.pop() if number else ((), (embedded_BSH,))
            found = torch.autograd.grad(outputs, [*into, *segment.by_autograd], gradients)
            outputs, gradients = outputs_before, found[: len(into)]
            if number == 0:
                with record_function("embedding"):
                    add_embedding_gradient_(self._dembedding_VH, tokens_T, gradients[0].flatten(0, 1))
            with record_function("Optimizer.step: accumulate"):
                for parameter, gradient in zip(segment.by_autograd, found[len(into) :], strict=True):
                    if is_first:
                        self.sums[parameter].copy_(gradient)
                    else:
                        self.sums[parameter].add_(gradient)
            del found
            yield segment.parameters

    def _is_recordable(self) -> bool:
        """Whether the host only starts kernels: plain experts ask for loads, recomputation for random states."""
        model, train = self.config.model, self.config.train
        uses_triton = self.dtype == torch.bfloat16 and model.attention_backend != "reference" and not model.dropout
        is_compiled = self.device.type == "cuda" and compiles(train, self.device)
        return is_compiled and uses_triton and not train.gradient_checkpointing


class _Segment(NamedTuple):
    """Consecutive layers, with what comes before the first and behind the last one."""

    first_layer: int
    parameters: list[Tensor]
    """Those whose sums are complete after this segment and the later ones."""
    by_autograd: list[Tensor]
    """Those of them that autograd has the gradients of."""


def _segments(model: Transformer, count: int) -> list[_Segment]:
    """At most `count` of nearly equally many layers, from the first layers on."""
    embedding, head = model.model.embed_tokens.weight, model.head_weight
    layers, count = len(model.layers), min(count, len(model.layers))
    found = []
    for number in range(count):
        begin, end = (layers * n // count for n in (number, number + 1))
        parameters: list[Tensor] = [p for layer in model.layers[begin:end] for p in layer.parameters()]
        if end == layers:
            parameters += [model.model.norm.weight, *([] if head is embedding else [head])]
        if begin == 0:
            parameters.append(embedding)
        by_autograd = [parameter for parameter in parameters if parameter is not embedding and parameter is not head]
        found.append(_Segment(begin, parameters, by_autograd))
    return found


def auxiliary_losses(router: RouterStatistics, balance: BalanceConfig, scale: Tensor) -> list[Tensor]:
    """The weighted ones that are on, summed over layers and valid tokens, times `scale`."""
    weighted = ((balance.sequence_loss_weight, router.balance_loss_L), (balance.z_loss_weight, router.z_loss_L))
    return [weight * loss_L.sum() * scale for weight, loss_L in weighted if weight]
