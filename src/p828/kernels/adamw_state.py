"""What an update of AdamW is given, whichever code makes it."""

from typing import NamedTuple

from torch import Tensor


class MatrixState(NamedTuple):
    """One matrix and what its update needs; contiguous, of equal shape."""

    weight: Tensor
    """bfloat16: what the layers compute with."""
    low_bits: Tensor
    """int16: what the float32 master has beyond it, in units of the master's last place."""
    gradient: Tensor
    """float32: the sum over a step's micro-batches."""
    exp_avg: Tensor
    """First moment, bfloat16 or float32."""
    exp_avg_sq: Tensor
    """Second moment, in the same dtype."""


class Update(NamedTuple):
    """What one update of all matrices has in common. The tensors are on the device: the host need not know them."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    clip: Tensor
    """float32 scalar: gradients are multiplied by it."""
    found_inf: Tensor
    """float32 scalar: 1 where something was not finite; nothing changes then."""
    updates: Tensor
    """int64 scalar: how many updates came before."""
    corrections: Tensor
    """float32 (2,), `bias_corrections`."""
