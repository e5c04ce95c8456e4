"""The norms of a step's gradients, and how far the global one makes them shorter. The host waits for neither."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_norms(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of each gradient: float32 (P,), from one pass over them."""
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(0)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def global_norm(norms_P: Tensor) -> Tensor:
    """Root of the sum of squares over all gradients, from `gradient_norms`: a float32 scalar."""
    return torch.linalg.vector_norm(norms_P)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Factor on gradients of global norm `norm` that makes it at most `max_norm`, a scalar of the norm's dtype.

    It is the factor of `torch.nn.utils.clip_grad_norm_`, but an update multiplies by it, which saves a pass over them.
    """
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)
