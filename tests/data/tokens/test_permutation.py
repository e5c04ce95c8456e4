import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p828.data.tokens.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_every_row_once(length: int, seed: int) -> None:
    assert sorted(Permutation(length, (seed, 0))(range(length))) == list(range(length))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 1_000_003, 2**20])
def test_every_row_once_at_edges(length: int) -> None:
    assert np.array_equal(np.sort(Permutation(length, (3, 1))(np.arange(length))), np.arange(length))


def test_places_alone_decide() -> None:
    order = Permutation(10**10, (7, 2))
    places = np.random.default_rng(0).integers(0, 10**10, 500)
    together = order(places)
    assert ((together >= 0) & (together < 10**10)).all()
    assert [int(order(place)) for place in places[:50]] == together[:50].tolist()
    assert order(places.reshape(5, 100)).tolist() == together.reshape(5, 100).tolist()


def test_an_order_stays_what_it_was() -> None:
    """Runs resume with another version of this program: these numbers may not change."""
    assert Permutation(10, (1, 2))(range(10)).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert Permutation(5000, (1, 2))(range(8)).tolist() == [2599, 588, 3160, 2425, 3887, 1715, 975, 2931]


def test_all_orders_are_as_likely() -> None:
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    tries = 24 * 500
    for seed in range(tries):
        counts[tuple(Permutation(4, (seed, 0))(range(4)).tolist())] += 1
    chi_squared = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_squared < 23 + 5 * math.sqrt(2 * 23)  # 5 standard deviations over its mean


def test_neighbours_part() -> None:
    """The distance of two neighbours' places is that of two random rows, and no two keys agree."""
    length = 100_000
    one, other = (Permutation(length, key)(np.arange(length)) for key in ((1, 0), (1, 1)))
    # |x − y| of two uniform numbers in [0, 1): mean 1/3, standard deviation 1/√18
    for distance in (np.abs(np.diff(one)), np.abs(one - other), np.abs(one - np.arange(length))):
        assert abs(distance.mean() / length - 1 / 3) < 5 / math.sqrt(18 * length)
    assert abs(np.corrcoef(one, np.arange(length))[0, 1]) < 5 / math.sqrt(length)
    assert (one == other).sum() < 10  # 1 is expected
