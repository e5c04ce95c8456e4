"""A step's gradients at ZeRO stages 0 and 1: summed by each rank over its micro-batches, then reduced over ranks.

Below stage 2 a rank has room for a whole gradient. So only the step's last micro-batch needs collective operations, and
micro-batches run as on one device: as CUDA graphs, summed in float32. In the last one, the sums of a segment of layers
are reduced while the backward pass goes on with the segment before. DeepSpeed itself would launch every kernel of a
micro-batch, and a hook for each parameter, from the host, which takes longer than the GPU needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from p828.config import BalanceConfig
from p828.data.batch import Batch
from p828.engine.microbatch import GradientAccumulator
from p828.model.transformer import Transformer
from p828.optim.clipping import gradient_norms
from p828.optim.parts import ByPart, parts_of

SEGMENTS = 4  # with more, less of the last reduction is waited for; but each is one more graph to launch


class _Place(NamedTuple):
    """Where a parameter's sum lies."""

    flat: int
    """The number of the flat tensor."""
    start: int
    end: int


class GradientReducer:
    """A `GradientAccumulator` whose sums lie in flat tensors, so that they can be reduced in buckets.

    At stage 0 there is one flat tensor, and every rank gets all sums over ranks. At stage 1 there is one for each of
    DeepSpeed's parameter groups, laid out as DeepSpeed has it, and a rank gets the sums of the share that it updates.
    """

    def __init__(
        self,
        optimizer: Any,
        zero: Mapping[str, Any],
        model: Transformer,
        balance: BalanceConfig,
        dtype: torch.dtype,
        is_captured: bool,
    ) -> None:
        """`optimizer` is DeepSpeed's, and `zero` the `zero_optimization` of its settings.

        `dtype` and `is_captured` are as in `GradientAccumulator`.
        """
        self.rank, self.size, self.stage = dist.get_rank(), dist.get_world_size(), zero["stage"]
        if self.stage == 0:
            self._places, lengths = _end_to_end(list(model.parameters()))
        else:
            self._places, lengths = _as_in_groups(optimizer.bit16_groups, optimizer.bit16_groups_flat)
        device = model.head_weight.device
        self._flats = [torch.zeros(length, dtype=torch.float32, device=device) for length in lengths]
        sums = {p: self._flats[place.flat][place.start : place.end].view(p.shape) for p, place in self._places.items()}
        segments = SEGMENTS if zero["overlap_comm"] and self.size > 1 else 1
        self.gradients = GradientAccumulator(model, balance, dtype, is_captured, sums, segments)
        self.shares = [flat.chunk(self.size)[self.rank] if self.stage else flat for flat in self._flats]
        """The share of every flat tensor that this rank updates, complete after `finish`."""
        self._pieces = dict(self._own_pieces(model))
        self._by_part = ByPart(list(self._pieces), parts_of(name for name, _ in model.named_parameters()), device)
        self._bucket = zero["reduce_bucket_size"]
        self._reductions: list[dist.Work] = []

    def add(self, batch: Batch, is_last: bool) -> None:
        """Add the gradients of a micro-batch. In the step's last one, begin to reduce the sums over ranks."""
        if is_last and self.size > 1:
            self.gradients.add(batch, self._reduce)
        else:
            self.gradients.add(batch)

    def finish(self) -> Tensor:
        """Wait for the reductions. Returns this rank's terms of the squares of the norms by part, float64 (X,).

        Their sums over ranks are the squared norms, at stage 0 too, where every rank has all sums.
        """
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()
        norms_P = gradient_norms(self._pieces.values())
        return self._by_part.sum(norms_P.square()) / (1 if self.stage else self.size)

    def _own_pieces(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        """Name and sums of what this rank's shares hold of each parameter; at stage 0 it is all of each."""
        for name, parameter in model.named_parameters():
            place, first = self._places[parameter], 0
            last = len(self._flats[place.flat])
            if self.stage:
                length = last // self.size
                first, last = self.rank * length, (self.rank + 1) * length
            begin, end = max(place.start, first), min(place.end, last)
            if begin < end:
                yield name, self._flats[place.flat][begin:end]

    def _reduce(self, parameters: Sequence[Tensor]) -> None:
        for place in _joined(sorted(self._places[parameter] for parameter in parameters)):
            flat = self._flats[place.flat]
            for start in range(place.start, place.end, self._bucket):
                end = min(start + self._bucket, place.end)
                if self.stage == 0:
                    self._reductions.append(dist.all_reduce(flat[start:end], async_op=True))
                    continue
                for owner, begin, stop in _by_owner(start, end, len(flat) // self.size):
                    self._reductions.append(dist.reduce(flat[begin:stop], dst=owner, async_op=True))


def _end_to_end(parameters: Sequence[Tensor]) -> tuple[dict[Tensor, _Place], list[int]]:
    """Places in one flat tensor, and its length in a list."""
    places, end = {}, 0
    for parameter in parameters:
        places[parameter] = _Place(0, end, end + parameter.numel())
        end += parameter.numel()
    return places, [end]


def _as_in_groups(
    groups: Sequence[Sequence[Tensor]], flat_groups: Sequence[Tensor]
) -> tuple[dict[Tensor, _Place], list[int]]:
    """Places in flat tensors laid out as those of DeepSpeed's groups, and the lengths of these."""
    places = {}
    for number, (parameters, flat) in enumerate(zip(groups, flat_groups, strict=True)):
        for parameter in parameters:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            places[parameter] = _Place(number, start, start + parameter.numel())
    return places, [flat.numel() for flat in flat_groups]


def _joined(places: Sequence[_Place]) -> Iterator[_Place]:
    """Places, sorted, with those that follow each other in the same flat tensor made one."""
    current = places[0]
    for place in places[1:]:
        if place.flat == current.flat and place.start == current.end:
            current = current._replace(end=place.end)
        else:
            yield current
            current = place
    yield current


def _by_owner(start: int, end: int, share: int) -> Iterator[tuple[int, int, int]]:
    """Each rank that owns some of start … end, and where that begins and ends; `share` is the length of a share."""
    for owner in range(start // share, (end - 1) // share + 1):
        yield owner, max(start, owner * share), min(end, (owner + 1) * share)
