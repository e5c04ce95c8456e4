"""What the sharded engine cuts a model into (`engine/sharded/units.py`), by numbers alone."""

from collections.abc import Sequence
from typing import NamedTuple

from p828.plan.tensors import ParameterShape

ALIGNMENT = 64  # numbers, of every parameter and every shard
BUFFERS = 2  # of layers, which take turns at them
LAYERS = "model.layers."


class Units(NamedTuple):
    """Numbers of the flat tensors, what fills them up among them."""

    ends: tuple[int, ...]
    """Embedding and, if it is not tied to that, output head."""
    layers: tuple[int, ...]
    small: int
    """Numbers of the parameters that are in no unit: norms, sinks, routers."""

    @property
    def total(self) -> int:
        return sum(self.ends) + sum(self.layers)

    @property
    def layer_buffers(self) -> int:
        """Numbers of the buffers that layers take turns at."""
        return sum(sorted(self.layers)[-BUFFERS:])


def units_of(parameters: Sequence[ParameterShape], ranks: int) -> Units:
    lengths: dict[str, int] = {}
    for one in parameters:
        if one.is_matrix:
            unit = one.name.removeprefix(LAYERS).partition(".")[0] if one.name.startswith(LAYERS) else one.name
            lengths[unit] = lengths.get(unit, 0) + _aligned(one.numbers, ALIGNMENT)
    whole = {unit: _aligned(length, ALIGNMENT * ranks) for unit, length in lengths.items()}
    layers = tuple(length for unit, length in whole.items() if unit.isdecimal())
    ends = tuple(length for unit, length in whole.items() if not unit.isdecimal())
    return Units(ends, layers, sum(one.numbers for one in parameters if not one.is_matrix))


def _aligned(number: int, to: int) -> int:
    return -(-number // to) * to
