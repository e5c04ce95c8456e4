"""How long a device was at work in a step, by a clock that the test sets."""

import time

import pytest

from p828.system.timing import DeviceSpan


class Left:
    """What a GPU has left to do, or has done."""

    def __init__(self, is_done: bool) -> None:
        self.is_done = is_done

    def query(self) -> bool:
        return self.is_done


@pytest.mark.parametrize(
    "waited, is_done, expected",
    [(5.0, True, 6.0), (0.2, True, 6.0), (0.1, True, 0.1), (0.0, True, 0.0), (0.1, False, 6.0), (0.0, False, 6.0)],
)
def test_a_device_that_the_host_need_not_wait_for_was_not_busy(
    monkeypatch: pytest.MonkeyPatch, waited: float, is_done: bool, expected: float
) -> None:
    """Unless it has more to do. A step of two micro-batches, the first at 10.0, whose numbers come at 16.0."""
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    span = DeviceSpan()
    assert span.end(0.0, Left(True)) is None, "nothing began"
    span.begin()
    span.pause()
    now = 11.0
    span.begin()
    now = 16.0
    assert span.end(waited, Left(is_done)) == expected
    assert span.end(waited, Left(is_done)) is None, "the next step has not begun"


@pytest.mark.parametrize("is_done, expected", [(False, 9.0), (True, 6.0)])
def test_a_device_with_work_of_the_step_before_has_not_rested(
    monkeypatch: pytest.MonkeyPatch, is_done: bool, expected: float
) -> None:
    """The numbers of a step come at 10.0, the next one begins at 13.0, and its numbers come at 19.0."""
    now = 8.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    span, update = DeviceSpan(), Left(False)
    span.begin()
    now = 10.0
    span.end(1.0, update)
    now, update.is_done = 13.0, is_done
    span.begin()
    now = 19.0
    assert span.end(5.0, Left(True)) == expected


def test_a_cpu_is_at_work_in_the_engines_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches of a second each, with four seconds of the loop's between them, and two before the update."""
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    span = DeviceSpan()
    for _ in range(2):  # the second step begins anew
        for between in (4.0, 2.0):
            span.begin()
            now += 1.0
            span.pause()
            now += between
        span.begin()
        now += 0.5
        assert span.end(0.0, None) == 2.5
