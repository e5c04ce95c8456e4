"""Parts of tensors, as ranks hold them and as checkpoints keep them."""

from typing import NamedTuple

from torch import Tensor


class Fragment(NamedTuple):
    """Consecutive numbers of a tensor that is spread over ranks."""

    values: Tensor
    """(n,), a view of where they are kept."""
    start: int
    """The place of the first of them in the flattened tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


def values_of(value: Tensor | Fragment) -> Tensor:
    """The numbers, whichever it is."""
    return value.values if isinstance(value, Fragment) else value
