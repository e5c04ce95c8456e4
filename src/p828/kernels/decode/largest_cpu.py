"""The largest of a head's logits on a CPU, found by half of the head's bytes.

A head's first part in float16 gives each logit w·x to within ‖w − first‖ ‖x‖ (Cauchy and Schwarz) and the roundings of
float32 sums. So only a few rows can have the largest one, most often a single row, and float32 decides among these.
"""

import math

import torch
from torch import Tensor

from p828.kernels.decode.float16_cpu import EPSILON, Float16Matrix, lost_by_first_part

MOST_ROWS = 1024  # that are compared in a step: gathering more would take as long as all products


class LargestRow:
    """Which row of a float32 weight (V, H) has the largest product with each token."""

    def __init__(self, weight_VH: Tensor, first: Float16Matrix) -> None:
        """`first` is the weight's first part."""
        self.weight_VH, self.first = weight_VH, first
        # A float32 sum of H products errs by H half epsilons of the sum of their magnitudes.
        rounding = weight_VH.shape[1] * EPSILON / 2 * _longest(weight_VH)
        self.error = lost_by_first_part(weight_VH, first) + rounding
        """At most that of a logit, over the norm of x. No finite number for a weight with one that is none."""

    def __call__(self, x_TH: Tensor) -> Tensor | None:
        """int64 (T,), of equal products the first row's; None if some product may be no finite number.

        None, too, where more than MOST_ROWS may have the largest one.
        """
        near_TV = self.first(x_TH).numpy()  # NumPy finds the extremes of so many numbers in a tenth of PyTorch's time
        largest_T1 = near_TV.max(axis=1, keepdims=True)
        if not (math.isfinite(largest_T1.sum()) and math.isfinite(near_TV.min())):  # NaN if there is one
            return None
        error_T1 = (torch.linalg.vector_norm(x_TH, dim=1, keepdim=True) * self.error).numpy()
        may_be_TV = near_TV >= largest_T1 - 2 * error_T1
        rows = [torch.from_numpy(may_be_V.nonzero()[0]) for may_be_V in may_be_TV]
        if not math.isfinite(error_T1.sum()) or sum(map(len, rows)) > MOST_ROWS:
            return None
        return torch.stack([self._largest_of(rows_X, x_H) for rows_X, x_H in zip(rows, x_TH, strict=True)])

    def _largest_of(self, rows_X: Tensor, x_H: Tensor) -> Tensor:
        if len(rows_X) == 1:
            return rows_X[0]
        # Not `mv`, which sums rows in an order that depends on their place, so that equal rows may differ.
        return rows_X[(self.weight_VH[rows_X] * x_H).sum(1).argmax()]


def _longest(weight_VH: Tensor) -> float:
    return torch.linalg.vector_norm(weight_VH, dim=1).max().item()
