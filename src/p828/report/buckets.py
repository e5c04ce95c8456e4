"""Long curves thinned to what a screen can show, without losing a spike."""

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1000  # of a curve over its whole length; a wide screen has some 1,000 dots for it


def edges(count: int, buckets: int = BUCKETS) -> NDArray[np.int64]:
    """The first index of each bucket, of `buckets` of nearly equal length; of each step if two would have room."""
    if count <= 2 * buckets:
        return np.arange(count, dtype=np.int64)
    return np.arange(buckets, dtype=np.int64) * count // buckets


def thinned(values: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Least and greatest value of each bucket, two numbers a bucket; the values themselves if each is a bucket.

    The greatest comes first where the bucket's curve falls from its first value to its last one. NaN is left out, and
    stays where a bucket has nothing else.
    """
    if len(starts) == len(values):
        return values
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    falls = values[starts] > values[_lasts(starts, len(values))]
    pairs = np.stack([np.where(falls, high, low), np.where(falls, low, high)], axis=1)
    return pairs.ravel().astype(np.float32)


def means(values: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean of each bucket's numbers that are not NaN, twice, at the places of `thinned`."""
    is_number = ~np.isnan(values)
    sums = np.add.reduceat(np.where(is_number, values, 0), starts, dtype=np.float64)
    counts = np.add.reduceat(is_number, starts, dtype=np.int64)
    with np.errstate(invalid="ignore"):  # of no number the mean is NaN
        return np.repeat(sums / counts, 2).astype(np.float32)


def places(axis: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where the numbers of `thinned` are on an axis: the first and the last place of each bucket."""
    if len(starts) == len(axis):
        return axis
    return np.stack([axis[starts], axis[_lasts(starts, len(axis))]], axis=1).ravel()


def _lasts(starts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.append(starts[1:], count) - 1
