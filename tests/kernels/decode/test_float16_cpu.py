"""Products of weights in float16 against the weights themselves, and sums in float64."""

import pytest
import torch
from torch import Tensor

from p828.kernels.decode import float16_cpu
from p828.kernels.decode.cpu import HUGE, LARGE, Matrix, matrix_of
from p828.kernels.decode.float16_cpu import EPSILON, Float16Matrix, float16_matrix, has_float16_products

pytestmark = pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(weight_VH: Tensor, most: int) -> Float16Matrix:
    matrix = float16_matrix(weight_VH, most)
    assert matrix is not None
    return matrix


def numbers(matrix: Float16Matrix, width: int) -> Tensor:
    """The weight as the products see it: each sum has one term that is not 0."""
    return matrix(torch.eye(width)).T


@pytest.mark.parametrize("exponent", [0, -60, -20, 20, 100])
def test_bfloat16_is_held_in_one_part(exponent: int) -> None:
    """Bit for bit, whatever the largest magnitude is. Its 2^14 in float16 stands beside 2^-14, the least normal number,
    and 2^-17, the least that has 8 bits, as bfloat16 does."""
    weight_VH = random(70, 40).bfloat16()
    weight_VH[0, 0] = 4.0
    weight_VH[3] = 0
    weight_VH[4] *= 2.0**-24
    weight_VH[5] = (1 + torch.arange(40) / 128) * 2.0**-29
    weight_VH *= 2.0**exponent
    matrix = held(weight_VH, 1)
    assert matrix.parts == 1
    assert torch.equal(numbers(matrix, 40), weight_VH.float())


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1.0, 1e30])
def test_float32_is_held_in_two_parts(factor: float) -> None:
    """Each number to float32's epsilon: 11 bits and a sign bit and 11 more, of 24."""
    weight_VH = random(70, 40) * factor
    assert float16_matrix(weight_VH, 1) is None
    matrix = held(weight_VH, 2)
    assert matrix.parts == 2
    assert ((numbers(matrix, 40).double() / weight_VH.double() - 1).abs() <= EPSILON).all()


def test_small_numbers_lose_nothing_that_shows_in_their_row() -> None:
    """The largest number is 2^15 in float16, the least step 2^-24, in the low part 2^-35; half of it is lost."""
    weight_VH = random(50, 64)
    weight_VH[:, ::3] *= 2.0**-40
    weight_VH[:, 1::3] = 0.0
    matrix = held(weight_VH, 2)
    bound = 2.0**-50 * weight_VH.abs().max() + EPSILON * weight_VH.abs()
    assert ((numbers(matrix, 64) - weight_VH).abs() <= bound).all()


@pytest.mark.parametrize(
    "row",
    [
        torch.full((40,), 2.0**-60),  # nothing in float16 beside numbers near 1
        torch.full((40,), 2.0**-120),  # whose square is nothing in float32
        torch.full((40,), float("inf")),
        torch.full((40,), float("nan")),
    ],
    ids=["tiny", "tinier", "infinite", "NaN"],
)
@pytest.mark.parametrize("place", [0, 7])
def test_what_does_not_fit_stays_in_float32(row: Tensor, place: int) -> None:
    weight_VH = random(70, 40).bfloat16().float()
    weight_VH[place] = row
    assert float16_matrix(weight_VH, 2) is None


@pytest.mark.parametrize("largest", [1e-20, 1e-38, 1e-42, 0.0])
def test_weights_too_small_to_be_scaled(largest: float) -> None:
    """They stay in float32; zeros need no scale."""
    matrix = float16_matrix(torch.full((8, 16), largest), 2)
    assert (matrix is None) == (largest > 0)


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 17])
@pytest.mark.parametrize("most, rows", [(1, 100), (2, 100), (2, 131)])
def test_sums_are_those_of_float32(tokens: int, most: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several blocks, and added to what is there.

    A sum of 64 float32 products errs by 64 roundings at most, each of half an epsilon of the sum of magnitudes.
    """
    monkeypatch.setattr(float16_cpu, "BLOCK", 64)
    weight_VH, x_TH, out_TV = random(rows, 64), random(tokens, 64, seed=1), random(tokens, rows, seed=2)
    if most == 1:
        weight_VH = weight_VH.bfloat16().float()
    matrix = held(weight_VH, most)
    assert (len(matrix.blocks), matrix.parts) == (-(-rows // 64), most)
    expected = x_TH.double() @ weight_VH.double().T
    bound = 64 / 2 * EPSILON * (x_TH.double().abs() @ weight_VH.double().abs().T)
    assert ((matrix(x_TH).double() - expected).abs() <= bound).all()
    sums = out_TV.double() + expected
    matrix.add_product_(out_TV, x_TH)
    assert ((out_TV.double() - sums).abs() <= bound + EPSILON * sums.abs()).all()


def test_which_weights_are_held_in_float16() -> None:
    """Large ones whose numbers it holds, in whichever dtype they are given; their float32 copy is nowhere kept."""
    large = random(LARGE // 64, 64)
    for weight_VH in (large.bfloat16(), large.half().float()):
        assert isinstance(matrix_of(weight_VH), Float16Matrix)
    assert isinstance(matrix_of(large), Matrix)
    small = matrix_of(large[:-1].bfloat16())
    assert isinstance(small, Matrix)
    assert small.weight_VH.dtype == torch.float32


def test_a_huge_head_is_packed_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one token and for many the product in float32 is as good, and no copy is made."""
    monkeypatch.setattr("p828.kernels.decode.cpu.IS_AVX2", True)
    weight_VH = random(HUGE // 64, 64)
    head, other = Matrix(weight_VH, is_head=True), Matrix(weight_VH)
    for tokens in (1, 7, 2):
        assert "in_parts" not in vars(head)
        for matrix in (head, other):
            x_TH = random(tokens, 64, seed=1)
            torch.testing.assert_close(matrix(x_TH), x_TH @ weight_VH.T, rtol=0, atol=1e-4)
    assert head.in_parts is not None
    assert other.in_parts is None
