"""A rank's share of a checkpoint, by parameter and place, so that any engine on any number of ranks can read it."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from p828.engine.sharded.mesh import Mesh
from p828.engine.sharded.units import Piece, Unit
from p828.kernels.adamw import split_float32
from p828.optim.update_numbers import Held
from p828.runs.tensors import Master, Saveable, Tensors, TensorShard
from p828.runs.weights import Weights

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardState:
    """Masters and moments of a rank's shards, by unit."""

    def __init__(
        self, units: Sequence[Unit], shards: Sequence[Tensor], low_bits: Sequence[Tensor | None], mesh: Mesh
    ) -> None:
        """`shards` are the weights; without `low_bits` they are float32 and their own masters."""
        self.units, self.shards, self.low_bits = units, shards, low_bits
        self._mesh, self._pieces = mesh, [unit.pieces(mesh.shard, mesh.shards) for unit in units]

    def masters(self) -> dict[str, Saveable]:
        """Those that this rank saves, by parameter; the tensors are the ones that training goes on with."""
        found: dict[str, Saveable] = {}
        for number, piece in self._saved():
            low_bits = self.low_bits[number]
            low = None if low_bits is None else piece.of(low_bits)
            found[piece.name] = TensorShard(piece.of(self.shards[number]), piece.start, piece.shape, low)
        return found

    def load_masters(self, weights: Weights) -> None:
        for number, piece in self.pieces():
            self.set_master(number, piece, weights.shard(piece.name, piece.start, piece.length))

    def set_master(self, number: int, piece: Piece, values: Tensor) -> None:
        """Set the numbers of a unit's piece from float32 (n,)."""
        weight, low_bits = self.shards[number], self.low_bits[number]
        if low_bits is None:
            piece.of(weight).copy_(values)
            return
        high, low = split_float32(values.to(weight.device))
        piece.of(weight).copy_(high)
        piece.of(low_bits).copy_(low)

    def held(self) -> Iterator[Held]:
        """What this rank updates of the units' parameters."""
        for number, piece in self.pieces():
            low_bits = self.low_bits[number]
            yield Held(piece.name, piece.of(self.shards[number]), None if low_bits is None else piece.of(low_bits))

    def moments(self, optimizer: Mapping[str, Tensor]) -> dict[str, Saveable]:
        """What this rank saves of the optimizer's state, which names it by unit: by parameter."""
        return {
            f"{key}/{piece.name}": TensorShard(
                piece.of(optimizer[f"{key}/{self.units[number].name}"]), piece.start, piece.shape
            )
            for key in MOMENTS
            for number, piece in self._saved()
        }

    def load_moments(self, optimizer: Mapping[str, Tensor], tensors: Tensors) -> None:
        """Copy into the optimizer's state what `tensors` has of it."""
        saved = set(tensors.names("optimizer"))  # checkpoints of old versions may lack some before the first step
        for key in MOMENTS:
            for number, piece in self.pieces():
                if f"{key}/{piece.name}" in saved:
                    own = piece.of(optimizer[f"{key}/{self.units[number].name}"])
                    own.copy_(tensors.shard("optimizer", f"{key}/{piece.name}", piece.start, piece.length))

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Every piece with its unit's number."""
        for number, pieces in enumerate(self._pieces):
            for piece in pieces:
                yield number, piece

    def _saved(self) -> Iterator[tuple[int, Piece]]:
        """Of `pieces`, those that this rank saves: replicas, which all have them, take turns."""
        return (
            (number, piece) for number, piece in self.pieces() if number % self._mesh.replicas == self._mesh.replica
        )


def masters_of(shards: Sequence[Tensor], low_bits: Sequence[Tensor | None]) -> dict[Tensor, Master]:
    """Those of the shards that are bfloat16."""
    return {shard: Master(shard, low) for shard, low in zip(shards, low_bits, strict=True) if low is not None}
