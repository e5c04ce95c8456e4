"""A run's numbers, step by step, as columns."""

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p828.runs.records import finite_number

SCALARS = (
    "loss", "grad_norm", "lr", "tokens_per_second", "seconds", "data_seconds", "host_seconds", "mfu", "memory_bytes",
    "disk_free_bytes", "aux_loss",
)  # fmt: skip
BY_PART = ("grad_norms", "update_ratios", "source_tokens")  # objects of numbers; the column is KEY.NAME

GAP = array("f", [math.nan])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


OF_LISTS: Mapping[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "balance": ("balance", _mean),
    "balance_least": ("balance", min),
    "max_share": ("max_share", max),
    "min_share": ("min_share", min),
    "starved": ("starved", sum),
    "router_entropy": ("router_entropy", _mean),
    "bias_max": ("bias_max", max),
    "rank_memory_least": ("rank_memory_bytes", min),
}
"""Column to the record's list, an entry a layer or a rank, and what is made of it."""


class Series:
    """Takes in the records of steps, in the order of `metrics.jsonl`.

    Every column has a number for each step: float32, NaN where a record has none. The axes are float64.
    """

    def __init__(self) -> None:
        self.steps, self.tokens, self.hours = array("q"), array("d"), array("d")
        """Steps, tokens trained on, and hours spent in steps up to there."""
        self.columns: dict[str, array[float]] = {}
        """As long as up to the last step that has the number; NaN for those before it that have none."""
        self.rows = array("q")
        """Hash of each step's rows; -1 for one that has none."""

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a step's record; one of an earlier step than the last replaces all from there on."""
        step = record["step"]
        if self.steps and step <= self.steps[-1]:
            self._cut(step)
        self._add_axes(step, record)
        for name in SCALARS:
            self._put(name, record.get(name))
        for name, (key, of) in OF_LISTS.items():
            if values := record.get(key):
                try:
                    self._put(name, of(values))
                except (TypeError, OverflowError):  # no list of numbers, or of some past all floats
                    continue
        for key in BY_PART:
            parts = record.get(key)
            if type(parts) is dict:
                for part, value in parts.items():
                    self._put(f"{key}.{part}", value)

    def column(self, name: str) -> NDArray[np.float32]:
        """A copy of the column, infinities as NaN."""
        given = np.array(self.columns[name], dtype=np.float32)
        values = np.full(len(self.steps), np.nan, dtype=np.float32)
        values[: len(given)] = np.where(np.isfinite(given), given, np.nan)
        return values

    def axes(self) -> dict[str, NDArray[np.float64]]:
        """What a curve is drawn over: `steps`, `tokens`, `hours`."""
        return {name: np.array(getattr(self, name), dtype=np.float64) for name in ("steps", "tokens", "hours")}

    def _add_axes(self, step: int, record: Mapping[str, Any]) -> None:
        tokens, seconds = (record.get(key) for key in ("tokens", "seconds"))
        self.hours.append((self.hours[-1] if self.hours else 0.0) + (finite_number(seconds) or 0.0) / 3600)
        self.tokens.append(finite_number(tokens) or (self.tokens[-1] if self.tokens else 0.0))
        self.rows.append(_hash(record.get("rows")))
        self.steps.append(step)

    def _put(self, name: str, value: Any) -> None:
        """The last step's number in a column; what is no number is left out."""
        if type(value) is not float and type(value) is not int:
            return
        column = self.columns.get(name)
        if column is None:
            column = self.columns[name] = array("f")
        if gap := len(self.steps) - 1 - len(column):
            column.extend(GAP * gap)
        try:
            column.append(value)
        except OverflowError:  # an integer past all floats
            column.append(math.inf)

    def _cut(self, step: int) -> None:
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.rows[place:]
        for column in (self.tokens, self.hours, *self.columns.values()):
            del column[place:]


def compare_rows(one: Series, other: Series) -> tuple[int, int | None]:
    """How many steps of both can be compared by their rows, and the first of them with other rows."""
    (steps, rows), (other_steps, other_rows) = ((np.array(of.steps), np.array(of.rows)) for of in (one, other))
    both, at, there = np.intersect1d(steps, other_steps, return_indices=True)
    is_known = (rows[at] >= 0) & (other_rows[there] >= 0)
    differs = is_known & (rows[at] != other_rows[there])
    return int(is_known.sum()), int(both[differs][0]) if differs.any() else None


def _hash(text: Any) -> int:
    try:
        return int(text, 16) if type(text) is str and len(text) == 8 else -1
    except ValueError:
        return -1
