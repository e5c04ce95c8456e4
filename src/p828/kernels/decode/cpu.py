"""Products, norms and attention of a decoding step on a CPU, where the calls of a small model cost more than its sums.

Activations and sums are float32. T tokens, each the newest of its sequence.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.kernels.decode.float16_cpu import Float16Matrix, float16_matrix, has_float16_products, only_first_part
from p828.kernels.decode.largest_cpu import LargestRow

IS_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # where oneDNN reads a matrix at half of memory's speed
PIECES = 4  # of a matrix: MKL reads one for a single token in one thread, and several in one each
FEW = 4  # tokens up to which a matrix is better on the left, and from which on it is better in oneDNN's order
FEW_IN_PARTS = 6  # tokens up to which two products in float16 are better than one in float32
MOST_COMPARED = 16 if IS_AVX2 else 8  # tokens up to which the largest products are better found in float16
MEDIUM = 2**16  # numbers of a matrix from which it is, and below which it is better on the right
LARGE = 2**18  # and from which it is better in pieces, for one token, or in float16 if that holds it
HUGE = 2**22  # and from which it is better in oneDNN's order for any number of tokens, but with AVX2


class Matrix:
    """A weight (V, H) in float32, prepared for products with few tokens.

    MKL reads a matrix far larger than its caches well below memory's speed if few tokens stand on its left, as they do
    in `x weightᵀ`. oneDNN reads a copy of it in an order of its own choice, FBGEMM one in two parts of half the bytes
    each. A copy is made when it is first needed.
    """

    def __init__(self, weight_VH: Tensor, is_head: bool = False) -> None:
        """`is_head`: a step of any sequences goes through all of it, and so it is worth packing in float16."""
        self.weight_VH, self.weight_HV = weight_VH, weight_VH.t()
        self.numpy_VH = weight_VH.numpy()
        numbers = weight_VH.numel()
        self.is_medium, self.is_large, self.is_huge = numbers >= MEDIUM, numbers >= LARGE, numbers >= HUGE
        whole = len(weight_VH) // PIECES * PIECES
        self.pieces_PXH = weight_VH[:whole].view(PIECES, -1, weight_VH.shape[1])
        self.rest_HX = self.weight_HV[:, whole:]
        self.is_head, self.goes_in_parts = is_head, is_head and self.is_huge and IS_AVX2
        self._reordered: Tensor | None = None

    @cached_property
    def in_parts(self) -> Float16Matrix | None:
        """For a few tokens; None where one product in float32 is better, or the only one."""
        return float16_matrix(self.weight_VH, 2) if self.goes_in_parts else None

    @property
    def is_packed(self) -> bool:
        """Whether what `largest_row` packs is there."""
        return "largest_row" in vars(self) or vars(self).get("in_parts") is not None

    @cached_property
    def largest_row(self) -> LargestRow | None:
        """For steps of up to MOST_COMPARED tokens that ask for no more of the products; None where it gains nothing."""
        if not (self.is_head and self.is_huge and has_float16_products()):
            return None
        parts = vars(self).get("in_parts")  # not made for this, as the second of them may never be needed
        return LargestRow(self.weight_VH, only_first_part(self.weight_VH) if parts is None else parts.first_part())

    def __call__(self, x_TH: Tensor) -> Tensor:
        """x weightᵀ: (T, V)."""
        tokens = x_TH.shape[0]
        if not (self.is_large if tokens == 1 else self.is_medium):
            return x_TH.mm(self.weight_HV)
        if 1 < tokens <= FEW_IN_PARTS and self.in_parts is not None:
            return self.in_parts(x_TH)
        if (self.is_huge and not IS_AVX2) or tokens > FEW:
            return self._by_onednn(x_TH)
        if tokens > 1:
            # MKL takes up to five times as long if x lies in columns, as it does behind a product on the left.
            return self.weight_VH.mm(x_TH.contiguous().t()).t()
        out_1V = self.pieces_PXH.bmm(x_TH.t().expand(PIECES, -1, 1)).view(1, -1)
        return torch.cat((out_1V, x_TH.mm(self.rest_HX)), dim=1) if self.rest_HX.shape[1] else out_1V

    def add_product_(self, out_TV: Tensor, x_TH: Tensor) -> None:
        """Add x weightᵀ to `out_TV`."""
        if self.is_medium:
            out_TV.add_(self(x_TH))
        else:
            out_TV.addmm_(x_TH, self.weight_HV)

    def _by_onednn(self, x_TH: Tensor) -> Tensor:
        if not torch.backends.mkldnn.is_available():
            return x_TH.mm(self.weight_HV)
        if self._reordered is None:
            # The order for two tokens serves any number; the one for a single token does not.
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(self.weight_VH, 2)
        out_TV: Tensor = torch.ops.mkldnn._linear_pointwise(x_TH, self._reordered, None, "none", [], "")
        return out_TV


def matrix_of(weight_VH: Tensor, is_head: bool = False) -> Matrix | Float16Matrix:
    """A weight (float32 or bfloat16) in half of float32's bytes if that is faster and loses no more than it would."""
    in_float16 = float16_matrix(weight_VH, 1) if weight_VH.numel() >= LARGE else None
    return Matrix(weight_VH.float(), is_head) if in_float16 is None else in_float16


class Norm:
    """RMSNorm over the last dimension."""

    def __init__(self, weight_H: Tensor, eps: float) -> None:
        self.weight_H, self.numpy_H, self.eps = weight_H, weight_H.numpy(), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight_H.shape, self.weight_H, self.eps)


def rotate(x_TXD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """The pairs (i, i + D/2) of every head, rotated. The sine's first half has the opposite sign."""
    return torch.addcmul(x_TXD * cos_T1D, x_TXD.roll(x_TXD.shape[-1] // 2, -1), sin_T1D)


def attend(q_XMD: Tensor, keys_XCD: Tensor, values_XCD: Tensor, sinks_XM1: Tensor | None, mask: Tensor) -> Tensor:
    """softmax([q kᵀ / sqrt(D), sink]) v without the sink's column: (X, M, D), for M query heads of a key head.

    X counts the key heads of all sequences. `mask` is added to the scores: (X, 1, C), or a single 0 as (1, 1, 1).
    """
    scores_XMC = torch.baddbmm(mask, q_XMD, keys_XCD.transpose(1, 2), alpha=q_XMD.shape[-1] ** -0.5)
    if sinks_XM1 is None:
        return scores_XMC.softmax(dim=-1).bmm(values_XCD)
    return torch.cat((scores_XMC, sinks_XM1), dim=-1).softmax(dim=-1)[..., :-1].bmm(values_XCD)
