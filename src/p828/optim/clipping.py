"""The global norm of a step's gradients, and how far it makes them shorter. The host waits for neither."""

from collections.abc import Iterable

import torch
from torch import Tensor


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Root of the sum of squares over all gradients: a scalar of their dtype."""
    return torch.nn.utils.get_total_norm(gradients)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Factor on gradients of global norm `norm` that makes it at most `max_norm`, a scalar of the norm's dtype.

    It is the factor of `torch.nn.utils.clip_grad_norm_`, but an update multiplies by it, which saves a pass over them.
    """
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)
