"""A step's gradients, of which each rank keeps the sums of its shards in float32.

At stage 1 a rank sums whole gradients over its micro-batches, in float32, and they are summed over ranks in the last
one. From stage 2 on a unit's gradient of one micro-batch lies in a buffer that units take turns at; it is summed over
ranks at once, and then added to the sums of this rank's shard.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from p828.engine.sharded.collectives import start_scatter
from p828.engine.sharded.units import Unit
from p828.engine.sharded.weights import slot_of


class ShardedGradients:
    def __init__(
        self,
        units: Sequence[Unit],
        small: Mapping[str, Tensor],
        stage: int,
        rank: int,
        size: int,
        reduce_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`small` are the parameters that are in no unit. Layers' gradients are summed over ranks in `reduce_dtype`."""
        self.size, self.reduces_each = size, stage >= 2
        """Whether every micro-batch's gradients are summed over ranks, or only those of the whole step."""
        self._slots = [slot_of(unit) if self.reduces_each else number for number, unit in enumerate(units)]
        buffers: dict[int, Tensor] = {}
        for slot, unit in zip(self._slots, units, strict=True):
            # Products with the head, and rows of the embedding, are added in float32.
            dtype = reduce_dtype if self.reduces_each and unit.layer is not None else torch.float32
            if slot not in buffers or len(buffers[slot]) < unit.length:
                buffers[slot] = torch.zeros(unit.length, dtype=dtype, device=device)
        self._flats = [buffers[slot][: unit.length] for slot, unit in zip(self._slots, units, strict=True)]
        self._own = [flat.chunk(size)[rank] for flat in self._flats]
        keeps_all = not self.reduces_each
        self.shards = self._own if keeps_all else [torch.zeros_like(own, dtype=torch.float32) for own in self._own]
        """The sums of this rank's shard of each unit, complete after `finish`."""
        self._small = torch.zeros(sum(p.numel() for p in small.values()), device=device)
        pieces = self._small.split([p.numel() for p in small.values()])
        self.small = {name: piece.view(p.shape) for (name, p), piece in zip(small.items(), pieces, strict=True)}
        """The sums of the parameters that are in no unit, by name."""
        self.places = {
            name: view for unit, flat in zip(units, self._flats, strict=True) for name, view in unit.views(flat).items()
        }
        """Where a micro-batch writes the gradients of the units' parameters, by name."""
        self._scatters: dict[int, tuple[int, dist.Work | None]] = {}  # by buffer: unit and operation
        self._reductions: list[dist.Work] = []
        self._is_set = [False] * len(units)  # whether the shard has sums of this step

    def make_room(self, number: int) -> None:
        """Have the device wait until the unit's buffer may be written."""
        self._collect(self._slots[number])

    def reduce(self, number: int) -> None:
        """Begin to sum a unit's gradient over ranks."""
        self._scatters[self._slots[number]] = number, start_scatter(self._flats[number])

    def reduce_small(self) -> None:
        """Begin to sum over ranks the gradients that are in no unit."""
        if self.size > 1:
            self._reductions.append(dist.all_reduce(self._small, async_op=True))

    def finish(self) -> Tensor:
        """Wait for all sums. Returns this rank's term of the squared global norm, a float64 scalar.

        The sum of the terms over ranks is the squared norm.
        """
        for slot in list(self._scatters):
            self._collect(slot)
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()
        squares = torch.stack(torch._foreach_norm(self.shards)).double().square().sum()
        return squares + torch.linalg.vector_norm(self._small).double().square() / self.size

    def begin_step(self) -> None:
        """Forget the sums of the step before."""
        self._small.zero_()
        self._is_set = [False] * len(self._is_set)

    def _collect(self, slot: int) -> None:
        """Wait for the operation on a buffer, and add what it gave to the sums."""
        if slot not in self._scatters:
            return
        number, scatter = self._scatters.pop(slot)
        if scatter is not None:
            scatter.wait()
        if self.reduces_each:
            add = self.shards[number].add_ if self._is_set[number] else self.shards[number].copy_
            add(self._own[number])
            self._is_set[number] = True
