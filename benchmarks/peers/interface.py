"""What a peer's model gives the benchmark."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Peer(NamedTuple):
    model: nn.Module
    forward_backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Adds the gradients of int64 (B, S) tokens and targets, for the step's number of targets (a scalar on the device).

    Returns the sum of the losses in nats over that number.
    """
    has_cuda_graph: bool = False
    """The gradients' addresses are captured: they are set to zero between steps, not freed."""
