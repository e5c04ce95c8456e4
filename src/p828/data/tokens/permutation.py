"""A random order of any number of rows that is computed, not stored."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = 8
SMALL = 1024  # up to here a sorted draw makes every order equally likely, which a network of few bits does not

Indices = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Permutation:
    """A permutation of range(length) drawn from a key, in constant memory.

    A Feistel network over pairs (left, right) with left < a, right < b and a · b just over `length`, whose values
    past the end are put through again until they fall below it: FE2 and cycle walking of Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains" (2002), with a mixing function that is fast and not secret.
    """

    length: int
    """At most 2^62."""
    key: tuple[int, ...]

    def __call__(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """What stands at each of the places (any shape, each in range(length))."""
        if self.length <= SMALL:
            order = np.argsort(np.random.PCG64(self.key).random_raw(self.length), kind="stable")
            return order[np.asarray(places)].astype(np.int64)
        values = self._once(np.asarray(places, dtype=np.uint64).reshape(-1))
        while (outside := values >= self.length).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64).reshape(np.shape(places))

    def _once(self, values: Indices) -> Indices:
        a = np.uint64(math.isqrt(max(self.length - 1, 0)) + 1)
        b = np.uint64(-(-self.length // int(a)))
        left, right = values % a, values // a
        # Numpy promises an unchanging stream of this generator, so that an order stays the same with its versions.
        round_keys = np.random.PCG64(self.key).random_raw(ROUNDS)
        for i in range(0, ROUNDS, 2):
            left = (left + mix(right ^ round_keys[i]) % a) % a
            right = (right + mix(left ^ round_keys[i + 1]) % b) % b
        return left + a * right


def mix(x: Indices) -> Indices:
    """The finisher of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): each bit of x changes half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
