"""Products with a weight that FBGEMM holds in float16, on an x86 CPU: half the bytes of float32, which bind few tokens.

Activations, sums and outputs are float32. T tokens, V rows of a weight.
"""

from typing import Any

import torch
from torch import Tensor

LARGEST = 14  # exponent that a weight's largest number is brought to, below float16's 2^16
SMALLEST = -64  # exponent of a largest number below which the factor might make activations subnormal
LOW_PART = 2.0**11  # by which the second part is larger than what it stands for: float16 holds 11 bits
BLOCK = 2**15  # rows of a weight, at most, that FBGEMM packs at a time: it goes down their columns
EPSILON = 2.0**-23  # float32's


def has_float16_products() -> bool:
    """Whether PyTorch has FBGEMM here, and would pack by it."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


class Float16Matrix:
    """A weight (V, H) for products with any number of tokens, in blocks of rows of one part or two.

    The weight times a power of two is high + low / 2^11, two numbers of float16, so that high and low are not subnormal
    but for what is nothing beside the row's others.
    """

    def __init__(self, blocks: list[list[Any]], scale: float) -> None:
        self.blocks, self.inverse = blocks, 1 / scale

    @property
    def parts(self) -> int:
        return max(map(len, self.blocks))

    def first_part(self) -> "Float16Matrix":
        """What the first part alone holds, in the same memory."""
        return Float16Matrix([block[:1] for block in self.blocks], 1 / self.inverse)

    def __call__(self, x_TH: Tensor) -> Tensor:
        """x weightᵀ: (T, V)."""
        scaled_TH = x_TH * self.inverse
        if len(self.blocks) == 1:
            return _product(scaled_TH, self.blocks[0])
        return torch.cat([_product(scaled_TH, block) for block in self.blocks], dim=1)

    def add_product_(self, out_TV: Tensor, x_TH: Tensor) -> None:
        """Add x weightᵀ to `out_TV`."""
        out_TV.add_(self(x_TH))


def float16_matrix(weight_VH: Tensor, most: int) -> Float16Matrix | None:
    """A weight in `most` parts at most; None where these do not hold it, or FBGEMM is not there.

    They hold it if what they lose of a number is at most float32's epsilon of its row's largest.
    """
    if not has_float16_products() or _parts(weight_VH[:1], _scale(weight_VH[:1]), most) is None:
        return None
    scale = _scale(weight_VH)
    blocks = []
    for block_XH in _blocks(weight_VH):
        parts = _parts(block_XH, scale, most)
        if parts is None:
            return None
        blocks.append([torch.ops.quantized.linear_prepack_fp16(part, None) for part in parts])
    return Float16Matrix(blocks, scale)


def only_first_part(weight_VH: Tensor) -> Float16Matrix:
    """The first part alone of a weight, which it need not hold."""
    scale = _scale(weight_VH)
    firsts = (_rounded(block_XH.float() * scale) for block_XH in _blocks(weight_VH))
    return Float16Matrix([[torch.ops.quantized.linear_prepack_fp16(first_XH, None)] for first_XH in firsts], scale)


def lost_by_first_part(weight_VH: Tensor, parts: Float16Matrix) -> float:
    """The largest norm of what the first part loses of a row of the weight that `parts` were made of.

    No finite number if the weight has one that is none.
    """
    lost = []
    for block_XH in _blocks(weight_VH):
        first_XH = _rounded(block_XH.float() / parts.inverse) * parts.inverse
        lost.append(torch.linalg.vector_norm(block_XH - first_XH, dim=1).max())
    return torch.stack(lost).max().item()


def _blocks(weight_VH: Tensor) -> tuple[Tensor, ...]:
    """Of BLOCK rows at most."""
    return weight_VH.tensor_split(-(-len(weight_VH) // BLOCK))


def _rounded(numbers: Tensor) -> Tensor:
    """To float16's, in float32."""
    return numbers.half().float()


def _scale(weight_VH: Tensor) -> float:
    """The power of two that brings the largest magnitude to 2^LARGEST and below twice that; 1 if it is too small."""
    largest = torch.linalg.vector_norm(weight_VH, ord=torch.inf)  # which copies nothing
    exponent = int(largest.float().frexp().exponent) - 1
    return 2.0 ** (LARGEST - exponent) if exponent >= SMALLEST else 1.0


def _parts(weight_VH: Tensor, scale: float, most: int) -> list[Tensor] | None:
    """Numbers of float16, in float32: high, and low if it is needed."""
    scaled_VH = weight_VH.float() * scale
    lost_VH, parts = scaled_VH, list[Tensor]()
    allowed_V = _largest(scaled_VH) * EPSILON
    for part in range(most):
        shift = LOW_PART**part
        parts.append(_rounded(lost_VH * shift))
        lost_VH = lost_VH - parts[-1] / shift
        if (_largest(lost_VH) <= allowed_V).all():
            return parts
    return None


def _largest(weight_VH: Tensor) -> Tensor:
    """Each row's largest magnitude; NaN if there is one."""
    return torch.linalg.vector_norm(weight_VH, ord=torch.inf, dim=1)


def _product(x_TH: Tensor, parts: list[Any]) -> Tensor:
    out_TV: Tensor = torch.ops.quantized.linear_dynamic_fp16(x_TH, parts[0])
    for part, packed in enumerate(parts[1:], 1):
        out_TV.add_(torch.ops.quantized.linear_dynamic_fp16(x_TH, packed), alpha=LOW_PART**-part)
    return out_TV
