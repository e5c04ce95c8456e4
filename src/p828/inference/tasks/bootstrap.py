"""How far a mean over items may be from that of other such items."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 828


def mean_interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean, over resamples of the values with replacement, always the same ones.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979); the percentile interval is
    chapter 13 of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993). Of equal values it is that value.
    """
    if not len(values):
        raise ValueError("no values")
    values_N = np.asarray(values, dtype=np.float64)
    chosen_RN = np.random.default_rng(SEED).integers(len(values_N), size=(RESAMPLES, len(values_N)))
    tail = (1 - coverage) / 2
    low, high = np.quantile(values_N[chosen_RN].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
