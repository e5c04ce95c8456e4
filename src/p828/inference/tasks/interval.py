"""How far a mean over items may be from that of other such items."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 828
Z95 = 1.959964  # the normal distribution's quantile at 0.975


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


def fraction_interval(is_true: Sequence[bool]) -> tuple[float, float]:
    """95% interval of a fraction: `mean_interval`, or Wilson's score interval where all values are equal.

    Of these, resampling would find no doubt at all, be it a single one. Wilson, "Probable inference, the law of
    succession, and statistical inference", Journal of the American Statistical Association 22 (1927).
    """
    if 0 < sum(is_true) < len(is_true):
        return mean_interval([float(value) for value in is_true])
    doubt = Z95**2 / (len(is_true) + Z95**2)  # Wilson's formula at a fraction of 0 or 1
    return (1 - doubt, 1.0) if all(is_true) else (0.0, doubt)
