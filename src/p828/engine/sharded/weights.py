"""The weights that layers compute with, gathered from the shards of a replica's ranks.

At stages 1 and 2 every unit has a buffer of its own, and is gathered once a step. At stage 3 the layers take turns at
`BUFFERS` buffers, and embedding and head at one. A parameter is a view of its unit's buffer at an address that never
changes, so that CUDA graphs may read it; who computes asks for the unit first.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from p828.engine.sharded.collectives import start_gather
from p828.engine.sharded.mesh import Mesh
from p828.engine.sharded.units import Unit

BUFFERS = 2  # of layers at stage 3: one is computed with while the other one is filled


class ShardedWeights:
    def __init__(self, units: Sequence[Unit], stage: int, mesh: Mesh, like: Tensor) -> None:
        """All zero. `like` has the weights' dtype and device."""
        self.units, self.mesh = units, mesh
        self.slots = [number if stage < 3 else slot_of(unit) for number, unit in enumerate(units)]
        """The buffer of each unit."""
        lengths: dict[int, int] = {}
        for slot, unit in zip(self.slots, units, strict=True):
            lengths[slot] = max(lengths.get(slot, 0), unit.length)
        buffers = {slot: like.new_zeros(length) for slot, length in lengths.items()}
        self.flats = [buffers[slot][: unit.length] for slot, unit in zip(self.slots, units, strict=True)]
        """Each unit's flat tensor, which holds the unit after `wait` until the buffer's next use."""
        shards = [flat.chunk(mesh.shards)[mesh.shard] for flat in self.flats]
        self.shards = shards if stage < 3 else [torch.zeros_like(shard) for shard in shards]
        """This rank's numbers of each unit; below stage 3 they are the unit's own."""
        self._held: dict[int, int] = {}  # by buffer: the unit that was gathered there last
        self._gathers: dict[int, dist.Work | None] = {}  # by buffer, those that were not waited for

    def gather(self, number: int) -> None:
        """Begin to gather a unit, unless its buffer has it. Nothing may be left to compute with the buffer's unit."""
        slot = self.slots[number]
        if self._held.get(slot) != number:
            self._settle(slot)
            self._held[slot] = number
            self._gathers[slot] = start_gather(self.flats[number], self.shards[number], self.mesh)

    def wait(self, number: int) -> None:
        """Have the device wait until the unit's weights are there; it is gathered now if it was not before."""
        self.gather(number)
        self._settle(self.slots[number])

    def forget(self) -> None:
        """The shards have new numbers, or are about to: what the buffers have is of no use."""
        self._held.clear()
        for slot in list(self._gathers):
            self._settle(slot)

    def gather_first(self, sequence: Iterable[int]) -> None:
        """Begin to gather units in the order of their use; of those that share a buffer the first one."""
        for number in sequence:
            if self.slots[number] not in self._held:
                self.gather(number)

    def _settle(self, slot: int) -> None:
        gather = self._gathers.pop(slot, None)
        if gather is not None:
            gather.wait()


def slot_of(unit: Unit) -> int:
    """The buffer that a unit shares with others at stage 3: 0 that of embedding and head, the others of layers."""
    return 0 if unit.layer is None else 1 + unit.layer % BUFFERS


def following(sequence: Sequence[int | None], slots: Sequence[int]) -> list[int | None]:
    """What to gather after each use: `sequence` are the units in the order of their use, again and again.

    It is the next unit that takes the same buffer, or None if that is the same unit. None in `sequence` is no use.
    """
    found: list[int | None] = []
    for position, number in enumerate(sequence):
        later = [*sequence[position + 1 :], *sequence[: position + 1]]
        same = (other for other in later if number is not None and other is not None and slots[other] == slots[number])
        following_unit = next(same, None)
        found.append(None if following_unit == number else following_unit)
    return found
