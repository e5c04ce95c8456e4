"""The row of the largest product, found by a first part in float16, against products in float64."""

import pytest
import torch
from torch import Tensor

from p828.kernels.decode import float16_cpu, largest_cpu
from p828.kernels.decode.cpu import HUGE, Matrix
from p828.kernels.decode.float16_cpu import has_float16_products, only_first_part
from p828.kernels.decode.largest_cpu import LargestRow

pytestmark = pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest_row(weight_VH: Tensor) -> LargestRow:
    return LargestRow(weight_VH, only_first_part(weight_VH))


@pytest.mark.parametrize("exponent", [0, -40, 40])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_it_is_the_largest(tokens: int, exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several blocks."""
    monkeypatch.setattr(float16_cpu, "BLOCK", 256)
    weight_VH, x_TH = random(1000, 64) * 2.0**exponent, random(tokens, 64, seed=1)
    expected_T = (x_TH.double() @ weight_VH.double().T).argmax(1)
    assert torch.equal(largest_row(weight_VH)(x_TH), expected_T)


def test_rows_that_float16_cannot_tell_apart() -> None:
    """All are one row, but for a factor that only the second part of a number has room for."""
    factor_V = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(2)) * 2.0**-20
    weight_VH = random(1, 64) * factor_V[:, None]
    largest = largest_row(weight_VH)
    near_V = largest.first(weight_VH[:1])[0]
    assert near_V.unique().numel() < 60, "otherwise the first part would do"
    # Products with the row itself are 2^-20 of it apart. Its 64 terms are positive, so that each of two sums errs by 64
    # roundings of 2^-24 at most, 4 rows.
    x_TH = torch.cat((weight_VH[:1], -weight_VH[:1]))
    chosen, chosen_of_least = largest(x_TH).tolist()
    assert factor_V.argsort(descending=True).tolist().index(chosen) <= 8
    assert factor_V.argsort().tolist().index(chosen_of_least) <= 8


@pytest.mark.parametrize("rows, columns", [(37, 33), (40, 64), (500, 512)])
def test_of_equal_rows_the_first_counts(rows: int, columns: int) -> None:
    """Wherever they are: sums of a row must not depend on its place."""
    generator = torch.Generator().manual_seed(3)
    for number in range(60):
        weight_VH, x_1H = random(rows, columns, seed=number), random(1, columns, seed=100 + number)
        equal = torch.randperm(rows, generator=generator)[: 2 + number % 5]
        weight_VH[equal] = 3 * x_1H
        assert largest_row(weight_VH)(x_1H).tolist() == [equal.min().item()]


def test_many_rows_that_may_be_it_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, where a token is zero."""
    monkeypatch.setattr(largest_cpu, "MOST_ROWS", 100)
    largest = largest_row(random(90, 64))
    assert largest(torch.zeros(1, 64)).tolist() == [0]
    assert largest(torch.zeros(2, 64)) is None
    assert largest(random(2, 64, seed=1)) is not None


def test_a_weight_of_zeros_and_a_huge_token() -> None:
    assert largest_row(torch.zeros(90, 64))(torch.full((1, 64), 3e38)) is None


def test_no_product_is_further_off_than_it_says() -> None:
    """Of numbers that lose as much as they can, in the direction that their loss has."""
    fractions_VH = (torch.arange(50 * 64).view(50, 64) % 1024 + 0.499) / 1024
    weight_VH = (1 + fractions_VH) * 2.0 ** (torch.arange(50)[:, None] % 9)
    largest = largest_row(weight_VH)
    first_VH = largest.first(torch.eye(64)).T
    distances = []
    for x_TH in ((weight_VH - first_VH).contiguous(), random(50, 64)):
        x_TH = x_TH / x_TH.norm(dim=1, keepdim=True)
        distances.append((largest.first(x_TH).double() - x_TH.double() @ weight_VH.double().T).abs().max().item())
    assert distances[1] < 0.95 * largest.error < distances[0] < largest.error
    lost_V = (weight_VH - first_VH).double().norm(dim=1)
    assert largest.error == pytest.approx(lost_V.max().item(), rel=0.05)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_left_to_others(number: float) -> None:
    """A token that is not, and one whose products are not."""
    x_TH = random(3, 64)
    x_TH[1, 5] = number
    assert largest_row(10 * random(100, 64))(x_TH) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first of two blocks."""
    monkeypatch.setattr(float16_cpu, "BLOCK", 70)
    weight_VH = random(100, 64)
    weight_VH[60, 3] = number
    assert largest_row(weight_VH)(random(2, 64, seed=1)) is None


def test_it_is_for_heads_and_takes_the_parts_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_VH, x_TH = random(HUGE // 64, 64), random(3, 64, seed=1)
    for has_parts in (False, True):
        monkeypatch.setattr("p828.kernels.decode.cpu.IS_AVX2", has_parts)
        head = Matrix(weight_VH, is_head=True)
        assert not head.is_packed
        assert (head.in_parts is not None) == has_parts
        largest = head.largest_row
        assert largest is not None
        assert head.is_packed
        assert torch.equal(largest(x_TH), (x_TH @ weight_VH.T).argmax(1))
        if head.in_parts is not None:
            assert largest.first.blocks[0][0] is head.in_parts.blocks[0][0]
    assert Matrix(weight_VH).largest_row is None
    assert Matrix(weight_VH[:-1], is_head=True).largest_row is None
