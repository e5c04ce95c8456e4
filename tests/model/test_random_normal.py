"""Numbers from a counter: normal, unrelated to each other, and the same however they are asked for."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from p828.model.random_normal import fill_normal_, inverse_normal, make_key, mix

COUNT = 400_000


def draw(seed: int = 0, name: str = "weight", count: int = COUNT, start: int = 0, block: int | None = None) -> Tensor:
    values = torch.empty(count)
    fill_normal_(values, 1.0, make_key(seed, name), start, block)
    return values


def cumulative(x: Tensor) -> Tensor:
    """The normal distribution's, in float64."""
    return 0.5 * torch.erfc(-x.double() / math.sqrt(2))


def test_mix_is_splitmix64() -> None:
    """The first outputs of the reference, prng.di.unimi.it/splitmix64.c, for the state 1234567."""
    gamma = 0x9E3779B97F4A7C15
    states = [((1234567 + n * gamma + 2**63) % 2**64) - 2**63 for n in range(1, 6)]
    expected = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [x % 2**64 for x in mix(torch.tensor(states)).tolist()] == expected


def test_inverse_normal_is_the_inverse() -> None:
    """Within 1e-6 of float64: random bits, the ends of the range, the median, and both sides of the tail's border."""
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0))
    border = [round((0.5 - 0.425) * 2**32) + n for n in range(-50, 50)]
    random = torch.cat((random, torch.tensor([0, 1, 2, -1, -2, 2**31 - 1, -(2**31), *border]), 2 ** torch.arange(31)))
    normal = statistics.NormalDist()
    for bits, value in zip(random.tolist(), inverse_normal(random.int()).tolist(), strict=True):
        beyond = ((bits if bits >= 0 else ~bits) + 0.5) / 2**32
        expected = math.copysign(normal.inv_cdf(beyond), bits)
        assert abs(value - expected) <= 1e-6 * max(1, abs(expected)), bits


def test_moments() -> None:
    """Of n draws, mean, variance, skewness and kurtosis are off by sqrt(1, 2, 15, 96 / n): five of those."""
    x = draw().double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert x.pow(power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(variance / COUNT))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("name", ["weight", "layers.0.q_proj.weight"])
def test_kolmogorov_smirnov(seed: int, name: str) -> None:
    """The largest distance to the exact distribution exceeds 2.5 / sqrt(n) once in 130,000 times."""
    expected = cumulative(draw(seed, name).sort().values)
    place = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum(expected - place[:-1], place[1:] - expected).max().item()
    assert 0.1 < distance * math.sqrt(COUNT) < 2.5  # a distance too small would be no chance, either


def test_no_correlation() -> None:
    """Not between neighbours at any distance, rows of a matrix, other seeds, names or keys that differ in a bit."""
    x = draw()
    pairs = [(x[:-lag], x[lag:]) for lag in (1, 2, 3, 4, 8, 16, 100, 128, 1024, 4096, 65536)]
    pairs += [(x, draw(seed=seed)) for seed in (1, 2, 3, 2**32, 2**63)]
    pairs += [(x, draw(name=name)) for name in ("weighu", "weight.", "weigh", "")]
    for one, other in pairs:
        for power in (1, 2):  # of the numbers, and of their sizes
            both = torch.stack((one.double() ** power, other.double() ** power))
            assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(both.shape[1])


def test_no_number_comes_twice_in_a_place() -> None:
    """Sequences differ from their first number on, also under seeds that follow each other."""
    first = torch.cat([draw(seed, name, count=100) for seed in range(100) for name in ("a", "b")])
    assert len(first.unique()) > 0.999 * len(first)  # of 20,000 among 2^32 a few are equal by chance, or rounded so


@pytest.mark.parametrize("block", [1, 7, 1000, 2**20])
def test_block_size_changes_nothing(block: int) -> None:
    count = 300 if block < 100 else 5000
    assert torch.equal(draw(count=count, block=block), draw(count=count))


def test_a_slice_is_that_part_of_the_whole() -> None:
    whole = draw(count=200_000)
    for start, count in ((0, 1), (1, 1000), (65_535, 70_000), (199_999, 1), (5, 0)):
        assert torch.equal(draw(count=count, start=start), whole[start : start + count])


def test_places_past_32_bits() -> None:
    """Neither a wrapped counter nor a repetition after 2^32 numbers."""
    start = 2**33 - 500
    far = draw(count=1000, start=start)
    assert torch.equal(far[700:], draw(count=300, start=start + 700))
    assert not torch.isin(far, torch.cat((draw(count=1000), draw(count=1000, start=2**32 - 500)))).any()


def test_matrices_are_filled_row_by_row_and_scaled() -> None:
    matrix = torch.empty(30, 40)
    fill_normal_(matrix, 0.02, make_key(0, "weight"))
    assert torch.equal(matrix.flatten(), draw(count=1200) * 0.02)
