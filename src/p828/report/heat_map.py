"""The load of every expert over the time of a run, in a bounded number of columns."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 256  # columns; when there are more, neighbours are joined
LEVELS_PER_DOUBLING = 32  # of a byte's 256: a share from 1/16 to 16 of an even one, in steps of 2%
MIDDLE = 128


class HeatMap:
    """Takes in the `load` lists of steps' records. Where the model's shape changes, it begins anew."""

    def __init__(self) -> None:
        self.first: list[int] = []
        """Each column's first step."""
        self.last: list[int] = []
        self._sums: list[NDArray[np.float64]] = []
        self._counts: list[int] = []
        self._records_a_column = 1

    def add(self, step: int, load: Any) -> None:
        """`load` is a list of layers of experts' tokens; anything else is left out."""
        shares_LE = _shares(load)
        if shares_LE is None:
            return
        if self._sums and (self._sums[-1].shape != shares_LE.shape or step <= self.last[-1]):
            self._keep_before(step if self._sums[-1].shape == shares_LE.shape else 0)
        if self._sums and self._counts[-1] < self._records_a_column:
            self._sums[-1] = self._sums[-1] + shares_LE
            self._counts[-1] += 1
            self.last[-1] = step
            return
        if len(self._sums) == MOST:
            self._halve()
        self.first.append(step)
        self.last.append(step)
        self._sums.append(shares_LE)
        self._counts.append(1)

    def to_json(self) -> dict[str, Any] | None:
        """Layers, experts, the columns' steps and their shares: a byte each, by column, layer, expert; None if empty.

        A byte b is a share of 2 to the power of (b − 128) / 32, times an even one; 0 is no token at all.
        """
        if not self._sums:
            return None
        layers, experts = self._sums[0].shape
        shares_TLE = np.stack(self._sums) / np.array(self._counts)[:, None, None]
        with np.errstate(divide="ignore"):  # of no token
            levels = np.log2(shares_TLE) * LEVELS_PER_DOUBLING + MIDDLE
        levels_TLE = np.where(shares_TLE > 0, np.clip(np.round(levels), 1, 255), 0).astype(np.uint8)
        shares = base64.b64encode(levels_TLE.tobytes()).decode()
        return {"layers": layers, "experts": experts, "first": self.first, "last": self.last, "shares": shares}

    def _keep_before(self, step: int) -> None:
        kept = sum(last < step for last in self.last)
        self.first, self.last = self.first[:kept], self.last[:kept]
        self._sums, self._counts = self._sums[:kept], self._counts[:kept]

    def _halve(self) -> None:
        self._sums = [one + other for one, other in zip(self._sums[::2], self._sums[1::2], strict=True)]
        self._counts = [one + other for one, other in zip(self._counts[::2], self._counts[1::2], strict=True)]
        self.first, self.last = self.first[::2], self.last[1::2]
        self._records_a_column *= 2


def _shares(load: Sequence[Sequence[int]]) -> NDArray[np.float64] | None:
    """Each expert's tokens over an even share of its layer's; None for what is no load."""
    try:
        load_LE = np.array(load, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if load_LE.ndim != 2 or not load_LE.size or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        return None
    shares_LE: NDArray[np.float64] = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    return shares_LE
