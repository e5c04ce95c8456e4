"""Micro-batches: forward, backward, and the sums over a step of what they give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import BalanceConfig, ModelConfig, TrainConfig
from p828.data.batch import Batch
from p828.engine.cuda_graph import CudaGraphRunner
from p828.kernels.embedding import add_embedding_gradient_
from p828.model.loss import IGNORE, loss_and_gradients
from p828.model.transformer import RouterStatistics, Transformer


def prepare_layers(model: Transformer, train: TrainConfig, balance: BalanceConfig) -> None:
    """Set in each layer whether to recompute activations, and whether to compute auxiliary losses."""
    for layer in model.layers:
        layer.gradient_checkpointing = train.gradient_checkpointing
        layer.auxiliary_losses = bool(balance.sequence_loss_weight or balance.z_loss_weight)


def micro_batch_totals(
    loss: Tensor, auxiliary: Sequence[Tensor], router: RouterStatistics, scale: Tensor
) -> dict[str, Tensor]:
    """What is summed over a step's micro-batches and over ranks, by name: scalars and tensors (L,), and the loads.

    `loss` is the micro-batch's share of the step's mean loss, `auxiliary` those of the auxiliary losses that are on.
    `scale` is 1 / targets of the step: times it, a sum over the micro-batch's targets becomes its share of the step's
    mean. A further sum is a line here; `interface.StepStats` passes it on to the step's record under its name.
    """
    totals = {"loss": loss, "loads_LE": router.loads_LE, "entropy_L": router.entropy_L}
    return totals | {"aux_loss": sum(auxiliary, torch.zeros_like(scale))} if auxiliary else totals


def zero_totals(model: ModelConfig, balance: BalanceConfig, device: torch.device) -> dict[str, Tensor]:
    """What a step's sums of `micro_batch_totals` begin with, in the same order."""
    layers, experts = model.num_hidden_layers, model.n_routed_experts
    loads_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
    zero = torch.zeros((), device=device)
    router = RouterStatistics(loads_LE, *(torch.zeros(layers, device=device) for _ in RouterStatistics._fields[1:]))
    totals = micro_batch_totals(zero, auxiliary_losses(router, balance, zero), router, zero)
    return {name: torch.zeros_like(total) for name, total in totals.items()}


def add_totals_(totals: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Add a micro-batch's to those of the step, in place."""
    for name, total in totals.items():
        total += found[name].detach()


class GradientAccumulator:
    """Sums a step's gradients over its micro-batches, in float32; and what `micro_batch_totals` names.

    Parameters may be float32 or bfloat16. The gradient of a matrix from one micro-batch has its parameter's dtype.
    Embedding and head are exceptions: they stay outside autograd, and their gradients are added in float32 from the
    start. Nothing is written to `.grad`, and no hook on a parameter runs.

    The backward pass may go in several segments of layers, so that the sums of the last layers can be used while the
    gradients of the first ones are still computed.
    """

    def __init__(
        self,
        model: Transformer,
        balance: BalanceConfig,
        dtype: torch.dtype,
        is_captured: bool = False,
        sums: Mapping[Tensor, Tensor] | None = None,
        segments: int = 1,
    ) -> None:
        """`dtype` is what the layers compute in. `is_captured`: micro-batches run as CUDA graphs.

        `sums` gives each parameter's sum a place, float32 and of the parameter's shape, if that matters. There are at
        most `segments` segments; auxiliary losses, whose gradients enter at every layer, make it one.
        """
        self.model, self.balance, self.dtype = model, balance, dtype
        self.device = model.head_weight.device
        self.sums: Mapping[Tensor, Tensor] = sums or {
            parameter: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for parameter in model.parameters()
        }
        self._dembedding_VH = self.sums[model.model.embed_tokens.weight]
        self._dhead_VH = self.sums[model.head_weight]  # the same one if they are tied
        has_auxiliary_losses = bool(balance.sequence_loss_weight or balance.z_loss_weight)
        self._segments = _segments(model, 1 if has_auxiliary_losses else segments)
        self.scale = torch.zeros((), device=self.device)
        """Factor on the losses: 1 / targets of the step. Set before the step's first micro-batch."""
        self.totals = zero_totals(model.config, balance, self.device)
        """The step's sums so far of `micro_batch_totals`, on this rank."""
        self._graphs = CudaGraphRunner(self._add, len(self._segments), self.device) if is_captured else None
        self._is_first = True  # of the step's micro-batches

    def add(self, batch: Batch, when_added: Callable[[list[Tensor]], None] = lambda parameters: None) -> None:
        """Add the gradients of a micro-batch; the host does not wait for the device.

        After each segment, `when_added` gets the parameters whose sums the device will have completed by then.
        """
        if self._graphs is None:
            added = self._add(batch.to(self.device), self._is_first)
        else:
            added = self._graphs(batch, self._is_first)
        for parameters in added:
            when_added(parameters)
        self._is_first = False

    def begin_step(self) -> None:
        """Forget the sums of the step before."""
        self._is_first = True
        for total in (self._dembedding_VH, self._dhead_VH, *self.totals.values()):
            total.zero_()  # all other gradients are set and not added by the first micro-batch

    def stop_capturing(self) -> None:
        """Launch every kernel from the host from now on: only then does a profiler see what each belongs to."""
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
        auxiliary = auxiliary_losses(output.router, self.balance, self.scale)
        add_totals_(self.totals, micro_batch_totals(loss * self.scale, auxiliary, output.router, self.scale))
        outputs: Sequence[Tensor] = [output.hidden_BSH, *auxiliary]
        gradients: Sequence[Tensor] = [dhidden_TH.view_as(output.hidden_BSH), *map(torch.ones_like, auxiliary)]
        boundaries = output.boundaries
        del output
        for number in reversed(range(len(self._segments))):
            segment = self._segments[number]
            outputs_before, inputs = boundaries.pop() if number else ((), (embedded_BSH,))
            found = torch.autograd.grad(outputs, [*inputs, *segment.by_autograd], gradients)
            outputs, gradients = outputs_before, found[: len(inputs)]
            if number == 0:
                with record_function("embedding"):
                    add_embedding_gradient_(self._dembedding_VH, tokens_T, gradients[0].flatten(0, 1))
            with record_function("Optimizer.step: accumulate"):
                for parameter, gradient in zip(segment.by_autograd, found[len(inputs) :], strict=True):
                    if is_first:
                        self.sums[parameter].copy_(gradient)
                    else:
                        self.sums[parameter].add_(gradient)
            del found
            yield segment.parameters


class _Segment(NamedTuple):
    """Consecutive layers. The first segment has the embedding, too, and the last one the final norm and the head."""

    first_layer: int
    parameters: list[Tensor]
    """Those whose sums are complete once the backward pass has gone through this segment."""
    by_autograd: list[Tensor]
    """Those of them whose gradients autograd computes."""


def _segments(model: Transformer, count: int) -> list[_Segment]:
    """At most `count` segments of nearly equally many layers, from the first layers on."""
    embedding, head = model.model.embed_tokens.weight, model.head_weight
    layers, count = len(model.layers), min(count, len(model.layers))
    segments = []
    for number in range(count):
        begin, end = (layers * n // count for n in (number, number + 1))
        parameters: list[Tensor] = [p for layer in model.layers[begin:end] for p in layer.parameters()]
        if end == layers:
            parameters += [model.model.norm.weight, *([] if head is embedding else [head])]
        if begin == 0:
            parameters.append(embedding)
        by_autograd = [parameter for parameter in parameters if parameter is not embedding and parameter is not head]
        segments.append(_Segment(begin, parameters, by_autograd))
    return segments


def auxiliary_losses(router: RouterStatistics, balance: BalanceConfig, scale: Tensor) -> list[Tensor]:
    """The weighted auxiliary losses that are on: scalars, summed over layers and valid tokens, times `scale`."""
    weighted = ((balance.sequence_loss_weight, router.balance_loss_L), (balance.z_loss_weight, router.z_loss_L))
    return [weight * loss_L.sum() * scale for weight, loss_L in weighted if weight]
