"""Parts of tensors, as ranks and the optimizer hold them and as checkpoints keep them."""

from typing import NamedTuple

from torch import Tensor


class TensorShard(NamedTuple):
    """Consecutive numbers of a tensor that is spread over ranks."""

    values: Tensor
    """(n,), a view of where they are kept."""
    start: int
    """The place of the first of them in the flattened tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


class Master(NamedTuple):
    """A float32 tensor as training keeps it, in two: `kernels.adamw.join_float32` gives its numbers."""

    weight: Tensor
    """bfloat16, what the layers compute with."""
    low_bits: Tensor
    """int16, of the same shape."""


Saveable = Tensor | TensorShard | Master


def tensors_of(value: Saveable) -> tuple[Tensor, ...]:
    """The tensors that a value is made of."""
    if isinstance(value, TensorShard):
        return (value.values,)
    return tuple(value) if isinstance(value, Master) else (value,)


def with_tensors(value: Saveable, tensors: tuple[Tensor, ...]) -> Saveable:
    """The same kind of value, made of other tensors."""
    if isinstance(value, TensorShard):
        return value._replace(values=tensors[0])
    return Master(*tensors) if isinstance(value, Master) else tensors[0]
