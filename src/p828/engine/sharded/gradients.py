"""A step's gradients, of which each rank keeps the sums of its shards in float32.

At stage 1 a rank sums whole gradients over its micro-batches, in float32, and they are summed over ranks in the last
one. From stage 2 on, each micro-batch's gradient of a layer lies in one of two buffers that layers take turns at, in
the dtype that autograd gives it. Every rank sends every other rank the numbers of that one's shard, and adds what it
gets to its sums in float32, in the order of ranks. That is as exact as a reduction in float32, at half of its bytes.

Embedding and head are summed as at stage 1 at any stage: their gradients are float32 from the start, which would be
twice the bytes, and are dense only after several micro-batches.

Where hosts have replicas, all of this is among a replica's ranks. Once a step, as soon as a shard's sums are complete
there, they are summed over replicas in float32, beside the rest of the backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from p828.engine.sharded.collectives import start_exchange, start_scatter, start_sum_of_ranks, start_sum_of_replicas
from p828.engine.sharded.mesh import Mesh
from p828.engine.sharded.registered import RegisteredMemory
from p828.engine.sharded.units import Unit
from p828.engine.sharded.weights import BUFFERS
from p828.optim.clipping import gradient_norms
from p828.optim.parts import ByPart, parts_of

AddParts = Callable[[Tensor, Tensor], None]


class _Buffer(NamedTuple):
    """What layers take turns at."""

    sent: Tensor
    """A layer's whole gradient of one micro-batch, flat."""
    received: Tensor
    """Of the same length: every rank's gradient of this rank's shard, end to end."""


class _Exchange(NamedTuple):
    """What is under way between ranks."""

    number: int
    """The unit."""
    operation: dist.Work | None
    is_last: bool
    """Whether the step's sums are complete with it."""


class ShardedGradients:
    def __init__(
        self,
        units: Sequence[Unit],
        small: Mapping[str, Tensor],
        stage: int,
        mesh: Mesh,
        like: Tensor,
        memory: RegisteredMemory,
        add_parts: AddParts,
    ) -> None:
        """`small` are the parameters that are in no unit. `like` has the weights' dtype and device.

        `memory` is for what is exchanged. `add_parts` is `add_parts_` of this file, as it is or compiled.
        """
        self._mesh, self._add_parts = mesh, add_parts
        self._slots = [unit.layer % BUFFERS if stage > 1 and unit.layer is not None else None for unit in units]
        """The buffer that a unit's gradient takes; None for one that is summed whole."""
        length = max(unit.length for unit in units if unit.layer is not None)
        count = 0 if stage == 1 else BUFFERS
        with memory.allocating():
            self._buffers = [_Buffer(like.new_zeros(length), like.new_zeros(length)) for _ in range(count)]
        self._flats = [
            torch.zeros(unit.length, device=like.device) if slot is None else self._buffers[slot].sent[: unit.length]
            for unit, slot in zip(units, self._slots, strict=True)
        ]
        self.shards = [
            flat.chunk(mesh.shards)[mesh.shard]
            if slot is None
            else torch.zeros(unit.length // mesh.shards, device=like.device)
            for unit, flat, slot in zip(units, self._flats, self._slots, strict=True)
        ]
        """The sums of this rank's shard of each unit, float32, complete after `finish`."""
        self._has_sums = [False] * len(units)  # of this step, where buffers are used
        self.places = {
            name: view for unit, flat in zip(units, self._flats, strict=True) for name, view in unit.views(flat).items()
        }
        """Where a micro-batch writes the gradients of the units' parameters, by name."""
        numbers = [parameter.numel() for parameter in small.values()]
        self._small = torch.zeros(sum(numbers), device=like.device)
        pieces = zip(small.items(), self._small.split(numbers), strict=True)
        self.small = {name: piece.view(parameter.shape) for (name, parameter), piece in pieces}
        """The sums of the parameters that are in no unit, by name."""
        self._summed, self._by_part = self._find_pieces(units)
        self._exchanges: dict[int, _Exchange] = {}  # by buffer
        self._scatters: list[tuple[int, dist.Work | None]] = []  # units and operations
        self._sums: list[dist.Work] = []

    def _find_pieces(self, units: Sequence[Unit]) -> tuple[list[Tensor], ByPart]:
        """The sums that this rank has of each parameter, those of `small` last, and what adds their norms by part."""
        pieces = [
            (piece.name, piece.of(shard))
            for unit, shard in zip(units, self.shards, strict=True)
            for piece in unit.pieces(self._mesh.shard, self._mesh.shards)
        ]
        names, sums = zip(*pieces, *self.small.items(), strict=True)
        return list(sums), ByPart(names, parts_of([*self.places, *self.small]), self._small.device)

    @property
    def sets_layers(self) -> bool:
        """Whether a micro-batch sets layers' gradients, and never adds to them."""
        return bool(self._buffers)

    def make_room(self, number: int) -> None:
        """Have the device wait until the unit's gradient may be written."""
        slot = self._slots[number]
        if slot is not None:
            self._collect(slot)

    def reduce(self, number: int, is_last: bool) -> None:
        """Begin to sum a unit's gradient over ranks, if it is to be in this micro-batch, the step's last or not."""
        slot, flat = self._slots[number], self._flats[number]
        if self._mesh.replicas > 1:  # shards that were scattered a phase ago may go on to other hosts
            self._finish_scatters()
        if slot is not None:
            exchange = start_exchange(self._received(number, slot), flat, self._mesh)
            self._exchanges[slot] = _Exchange(number, exchange, is_last)
        elif is_last:
            self._scatters.append((number, start_scatter(flat, self._mesh)))

    def reduce_small(self) -> None:
        """Begin to sum over ranks the gradients that are in no unit."""
        self._keep(start_sum_of_ranks(self._small, self._mesh))

    def finish(self) -> Tensor:
        """Wait for all sums. Returns this rank's terms of the squares of the norms by part, float64 (X,).

        Their sums over ranks are the squared norms. Every replica has all sums, and every rank those that are in no
        unit, so each counts for a part.
        """
        for slot in list(self._exchanges):
            self._collect(slot)
        self._finish_scatters()
        for one in self._sums:
            one.wait()
        self._sums.clear()
        squares_P = gradient_norms(self._summed).square()
        squares_P[-len(self.small) :] /= self._mesh.shards
        return self._by_part.sum(squares_P) / self._mesh.replicas

    def begin_step(self) -> None:
        """Forget the sums of the step before. The first micro-batch sets those that are not in `small`."""
        self._small.zero_()
        self._has_sums = [False] * len(self._has_sums)

    def _keep(self, operation: dist.Work | None) -> None:
        """Have `finish` wait for it."""
        if operation is not None:
            self._sums.append(operation)

    def _finish_scatters(self) -> None:
        """Wait for shards that were summed over a replica, and begin to sum them over replicas."""
        for number, scatter in self._scatters:
            if scatter is not None:
                scatter.wait()
            self._keep(start_sum_of_replicas(self.shards[number], self._mesh))
        self._scatters.clear()

    def _received(self, number: int, slot: int) -> Tensor:
        return self._buffers[slot].received[: len(self._flats[number])]

    def _collect(self, slot: int) -> None:
        """Wait for the exchange of a buffer, and add what came to the sums."""
        if slot not in self._exchanges:
            return
        number, exchange, is_last = self._exchanges.pop(slot)
        if exchange is not None:
            exchange.wait()
        parts_NS = self._received(number, slot).view(self._mesh.shards, -1)
        if self._has_sums[number]:
            self._add_parts(self.shards[number], parts_NS)
        else:
            torch.sum(parts_NS, 0, dtype=torch.float32, out=self.shards[number])
            self._has_sums[number] = True
        if is_last:
            self._keep(start_sum_of_replicas(self.shards[number], self._mesh))


def add_parts_(sum_S: Tensor, parts_NS: Tensor) -> None:
    """Add each rank's part to a float32 sum, in float32."""
    sum_S += parts_NS.sum(0, dtype=torch.float32)
