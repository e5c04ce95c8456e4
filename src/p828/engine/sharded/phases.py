"""A micro-batch cut into phases, between which weights are gathered and gradients reduced.

Embedding; each layer; norm, head and loss with their gradients; each layer's backward pass from the last on; the
embedding's gradient. Autograd's graph is cut before every layer, so that a layer's backward pass is a phase by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import BalanceConfig
from p828.data.batch import Batch
from p828.engine.cuda_graph import CudaGraphRunner
from p828.engine.microbatch import add_totals_, auxiliary_losses, micro_batch_totals, zero_totals
from p828.kernels.embedding import add_embedding_gradient_
from p828.model.loss import IGNORE, loss_and_gradients
from p828.model.transformer import LayerStatistics, RouterStatistics, Transformer, stacked

Pair = tuple[Tensor, Tensor]
"""x and delta, the residual stream before a layer or after it."""


class Phase(NamedTuple):
    """Units by their numbers, as `units.units_of` has them."""

    reads: int | None = None
    """The unit whose weights it computes with."""
    writes: int | None = None
    """The unit whose gradient it writes, or adds to."""
    completes: int | None = None
    """The unit whose gradient is complete after it."""


def phases_of(layers: int, is_tied: bool) -> list[Phase]:
    """The phases in their order. Unit 0 is the embedding, 1 to `layers` the layers, the last one the head."""
    embedding, head = 0, 0 if is_tied else layers + 1
    forward = [Phase(reads=number) for number in range(layers + 1)]
    backward = [Phase(number, number, number) for number in range(layers, 0, -1)]
    of_head = Phase(head, head, None if is_tied else head)
    return [*forward, of_head, *backward, Phase(None, embedding, embedding)]


class _Done(NamedTuple):
    """A layer's forward pass, kept for its backward pass."""

    entered: Pair
    left: Pair
    statistics: LayerStatistics


class PhasedPass:
    """Forward and backward pass of micro-batches, whose gradients are written to given places."""

    def __init__(
        self,
        model: Transformer,
        balance: BalanceConfig,
        dtype: torch.dtype,
        is_captured: bool,
        places: Mapping[str, Tensor],
        small: Mapping[str, Tensor],
        sets_layers: bool,
    ) -> None:
        """`dtype` is what the layers compute in. `is_captured`: phases run as CUDA graphs.

        `places` are those of matrices' gradients. The step's first micro-batch sets them and later ones add, or, if
        `sets_layers`, set those of layers too. `small` are the sums of the other parameters, always added to.
        """
        self._sets_layers = sets_layers
        self.model, self.balance, self.dtype = model, balance, dtype
        self.device = model.head_weight.device
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._places = {parameter: places[name] for parameter, name in names.items() if name in places}
        self._small = {parameter: small[name] for parameter, name in names.items() if name in small}
        self._parameters = [list(layer.parameters()) for layer in model.layers]
        self.phases = phases_of(len(model.layers), model.lm_head is None)
        self.scale = torch.zeros((), device=self.device)
        """Factor on the losses: 1 / targets of the step. Set before the step's first micro-batch."""
        self.totals = zero_totals(model.config, balance, self.device)
        """The step's sums so far of `micro_batch_totals`, on this rank."""
        self._graphs = CudaGraphRunner(self._run, len(self.phases), self.device) if is_captured else None

    def __call__(self, batch: Batch, is_first: bool) -> Iterator[Phase]:
        """Start a micro-batch's phases on the device one by one; after each the caller gets it, and may start more."""
        if self._graphs is None:
            return self._run(batch.to(self.device), is_first)
        return self._graphs(batch, is_first)

    def begin_step(self) -> None:
        """Forget the totals of the step before."""
        for total in self.totals.values():
            total.zero_()

    def _run(self, batch: Batch, is_first: bool) -> Iterator[Phase]:
        model, phases = self.model, iter(self.phases)
        tokens_T, targets_T = batch.tokens_BS.flatten(), batch.targets_BS.flatten()
        valid_BS = batch.targets_BS != IGNORE
        inputs = model.layer_inputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, self.dtype, valid_BS)
        x_BSH = model.embed(batch.tokens_BS, self.dtype).detach()
        stream = x_BSH, torch.zeros_like(x_BSH)
        del x_BSH
        yield next(phases)
        done: list[_Done] = []
        for layer in model.layers:
            entered = _leaves(stream)
            *left, statistics = layer(*entered, *inputs)
            done.append(_Done(entered, (left[0], left[1]), statistics))
            stream = done[-1].left
            yield next(phases)
        dstream = self._loss(stream, targets_T, stacked([one.statistics for one in done]), is_first)
        del stream, left, statistics, entered
        yield next(phases)
        while done:
            parameters = self._parameters[len(done) - 1]
            dstream = self._backward(done.pop(), parameters, dstream, is_first or self._sets_layers)
            yield next(phases)
        with record_function("embedding"):
            embedding = model.model.embed_tokens.weight
            if is_first and embedding is not model.head_weight:
                self._places[embedding].zero_()
            add_embedding_gradient_(self._places[embedding], tokens_T, dstream[0].flatten(0, 1))
        yield next(phases)

    def _loss(self, stream: Pair, targets_T: Tensor, router: RouterStatistics, is_first: bool) -> Pair:
        """Norm, head and loss. Returns the gradient of the stream, and writes those of norm and head."""
        model, entered = self.model, _leaves(stream)
        _, hidden_BSH = model.model.norm(*entered)
        dhead_VH = self._places[model.head_weight]
        with record_function("CrossEntropy"):  # such labels tell a profiler what autograd does not
            if is_first:
                dhead_VH.zero_()
            loss, dhidden_TH = loss_and_gradients(
                hidden_BSH.flatten(0, 1), model.head_weight, targets_T, self.scale, dhead_VH
            )
        auxiliary = auxiliary_losses(router, self.balance, self.scale)
        add_totals_(self.totals, micro_batch_totals(loss * self.scale, auxiliary, router, self.scale))
        norm = model.model.norm.weight
        *dstream, dnorm = torch.autograd.grad([hidden_BSH], [*entered, norm], [dhidden_TH.view_as(hidden_BSH)])
        self._small[norm].add_(dnorm)
        return dstream[0], dstream[1]

    def _backward(self, layer: _Done, parameters: Sequence[Tensor], dstream: Pair, is_set: bool) -> Pair:
        """A layer's backward pass. Returns the gradient of the stream before it, and writes its parameters'."""
        auxiliary = auxiliary_losses(stacked([layer.statistics]), self.balance, self.scale)
        outputs, gradients = [*layer.left, *auxiliary], [*dstream, *map(torch.ones_like, auxiliary)]
        found = torch.autograd.grad(outputs, [*layer.entered, *parameters], gradients)
        with record_function("Optimizer.step: accumulate"):
            for parameter, gradient in zip(parameters, found[2:], strict=True):
                if parameter in self._small:
                    self._small[parameter].add_(gradient)
                elif is_set:
                    self._places[parameter].copy_(gradient)
                else:
                    self._places[parameter].add_(gradient)
        return found[0], found[1]


def _leaves(stream: Pair) -> Pair:
    """Where autograd's graph is cut."""
    return stream[0].detach().requires_grad_(), stream[1].detach().requires_grad_()
