"""Arrays of numbers as text in a page: little-endian bytes in base64."""

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAST = 1  # zlib's level: the noise of a curve hardly compresses at any


def encoded_array(values: NDArray[Any]) -> dict[str, str]:
    """Base64 of the numbers as they are, and their type in a word: `f4` or `f8`."""
    return {"type": _type(values), "data": base64.b64encode(_bytes(values)).decode()}


def packed_array(values: NDArray[Any]) -> str:
    """Base64 of the numbers compressed by zlib ("deflate" of a browser's DecompressionStream)."""
    return base64.b64encode(zlib.compress(_bytes(values), FAST)).decode()


def _type(values: NDArray[Any]) -> str:
    return f"f{values.dtype.itemsize}"


def _bytes(values: NDArray[Any]) -> bytes:
    return values.astype(np.dtype(f"<f{values.dtype.itemsize}"), copy=False).tobytes()
