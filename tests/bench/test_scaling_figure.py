"""The figure of scaling: eight GPUs on paper, from steps whose times follow from known rates."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scaling_figure import Measured, by_system, cost_of_ring, predicted_seconds, shares_of, table

ALONE, PASSED = 0.27, 15e9
PER_BYTE, PER_STEP, FELT = 1 / 250e9, 1.5e-3, 0.4


def communication(gpus: int) -> float:
    """Seconds in which 15 GB, of which (n - 1) / n cross a link, go round a ring of n in n - 1 steps."""
    return PASSED * (gpus - 1) / gpus * PER_BYTE + PER_STEP * (gpus - 1)


def step(gpus: int) -> Measured:
    return Measured(gpus, ALONE + FELT * communication(gpus), communication(gpus), PASSED if gpus > 1 else 0)


def test_rates_that_two_numbers_of_gpus_give() -> None:
    assert cost_of_ring([step(2), step(4)]) == pytest.approx((PER_BYTE, PER_STEP))


def test_communication_that_grows_less_than_its_bytes_has_no_time_a_step() -> None:
    four = step(4)._replace(communication=communication(2))
    assert cost_of_ring([step(2), four]) == pytest.approx((communication(2) / (PASSED * 3 / 4), 0))


@pytest.mark.parametrize("counts", [(1, 2, 4), (2, 4), (1, 4)])
def test_eight_gpus(counts: tuple[int, ...]) -> None:
    found = predicted_seconds([step(gpus) for gpus in counts], ALONE, 8)
    per_step = PER_STEP if 2 in counts else 0.0  # by one number of GPUs, all time is the bytes'
    per_byte = PER_BYTE if 2 in counts else communication(4) / (PASSED * 3 / 4)
    assert found == pytest.approx(ALONE + FELT * (PASSED * 7 / 8 * per_byte + 7 * per_step))


def test_a_step_not_longer_than_on_one_gpu_stays_so() -> None:
    assert predicted_seconds([step(4)._replace(seconds=ALONE - 0.01)], ALONE, 8) == ALONE


def test_nothing_is_predicted_without_communication() -> None:
    assert predicted_seconds([step(1)], ALONE, 8) is None
    assert predicted_seconds([step(2)._replace(communication=0.0)], ALONE, 8) is None


def test_rows_of_the_benchmark() -> None:
    """Shares of the plain engine's rate on one GPU; a later row replaces the first; on a CPU nothing is profiled."""

    def row(system: str, gpus: int, seconds: float, **other: object) -> dict[str, object]:
        return {"system": system, "gpus": gpus, "seconds": seconds, "occupation": None, "passed_bytes": {}, **other}

    passed = {"reduce_scatter_tensor": 5e9, "all_gather_into_tensor": 10e9}
    rows = [
        row("plain", 1, 0.25),
        row("plain", 2, 0.26),
        row("sharded-1", 2, 9.0),
        row("sharded-1", 2, 0.5, occupation=[0.5, 0.1], passed_bytes=passed),
        row("sharded-1", 1, 0.25),
    ]
    plain, systems = by_system(rows)
    assert plain == 0.25
    assert systems["sharded-1"] == [Measured(1, 0.25, 0, 0), Measured(2, 0.5, 0.5, 15e9)]
    shares = shares_of(systems["sharded-1"], plain)
    assert shares.measured == {1: 1.0, 2: 0.5}
    assert shares.predicted == pytest.approx(0.25 / (0.25 + 0.25 * (7 / 8) / (1 / 2)))
    assert shares.checked is None
    assert "| p828, ZeRO 1 | 100.0% | 50.0% | 36.4% |  |" in table({"sharded-1": shares})
