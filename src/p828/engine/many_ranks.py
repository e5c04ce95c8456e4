"""What the engines of several ranks have in common: sums over ranks, and each rank's random states."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from p828.engine.interface import pack, shapes_of, unpack
from p828.runs.tensors import Saveable, Tensors
from p828.system.device import random_states, restore_random_states


def over_ranks(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Sums over a group's ranks, usually all, by name, in float64, from one collective operation."""
    packed = pack(tensors)
    dist.all_reduce(packed, group=group)
    return unpack(packed, shapes_of(tensors))


def random_states_of(rank: int, device: torch.device) -> dict[str, Saveable]:
    """This process's random states under the names that they have in a checkpoint."""
    return {f"{name}/{rank}" if rank else name: state for name, state in random_states(device).items()}


def restore_random_states_of(rank: int, tensors: Tensors, device: torch.device) -> None:
    """Take over the rank's states. With more ranks than before, the new ones draw from seeds of their own."""
    own = {name.partition("/")[0]: name for name in tensors.names("random") if _rank_of(name) == rank}
    if own:
        restore_random_states({name: tensors.tensor("random", key) for name, key in own.items()}, device)


def _rank_of(name: str) -> int:
    """The rank whose random state has this name: "cuda" is that of rank 0, "cuda/3" that of rank 3."""
    return int(name.partition("/")[2] or 0)
