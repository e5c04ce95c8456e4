"""Units of sharding: the matrices that are gathered and reduced together, in one flat tensor each.

A unit is the embedding, a layer, or the output head. Its flat tensor is cut into one shard a rank, equal in length. A
cut may go through a parameter; an optimizer that needs whole matrices would ask for other cuts in `units_of`.

Norms, sinks and routers are in no unit. They are float32 and less than a thousandth of a model, so every rank keeps
and updates all of them.
"""

from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from p828.model.precision import matrices

ALIGNMENT = 64  # numbers; every parameter and every shard begins at a multiple, 128 bytes in bfloat16
LAYERS = "model.layers."


class Place(NamedTuple):
    """Where a parameter lies in its unit's flat tensor."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + prod(self.shape)


class Piece(NamedTuple):
    """The numbers of one parameter that are in a rank's shard of a unit."""

    name: str
    offset: int
    """Place of the first number in the shard."""
    length: int
    start: int
    """Place of the first number in the flattened parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""

    def of(self, shard: Tensor) -> Tensor:
        """(n,): these numbers, in the shard or in a tensor laid out like it."""
        return shard[self.offset : self.offset + self.length]


class Unit(NamedTuple):
    name: str
    places: tuple[Place, ...]
    length: int
    """Of the flat tensor, a multiple of the number of ranks."""
    layer: int | None
    """The layer's index; None for embedding and head."""

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters in a flat tensor of this unit, by name."""
        return {place.name: flat[place.start : place.end].view(place.shape) for place in self.places}

    def pieces(self, rank: int, size: int) -> list[Piece]:
        """What the shard of `rank` among `size` ranks holds."""
        length = self.length // size
        begin, found = rank * length, []
        for place in self.places:
            start, end = max(place.start, begin), min(place.end, begin + length)
            if start < end:
                found.append(Piece(place.name, start - begin, end - start, start - place.start, place.shape))
        return found


def units_of(model: nn.Module, size: int) -> list[Unit]:
    """The units of a model for `size` ranks: embedding, layers, head; a head tied to the embedding is none."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in matrices(model):
        shapes.setdefault(_unit_name(name), {})[name] = tuple(parameter.shape)
    return [_unit(name, found, size) for name, found in shapes.items()]


def _unit_name(parameter: str) -> str:
    if parameter.startswith(LAYERS):
        return LAYERS + parameter.removeprefix(LAYERS).partition(".")[0]
    return parameter.removesuffix(".weight")


def _unit(name: str, shapes: dict[str, tuple[int, ...]], size: int) -> Unit:
    places, end = [], 0
    for parameter, shape in shapes.items():
        places.append(Place(parameter, end, shape))
        end = _aligned(places[-1].end, ALIGNMENT)
    layer = int(name.removeprefix(LAYERS)) if name.startswith(LAYERS) else None
    return Unit(name, tuple(places), _aligned(end, ALIGNMENT * size), layer)


def _aligned(number: int, to: int) -> int:
    return -(-number // to) * to
