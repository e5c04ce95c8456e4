"""How long a device was at work in a step, by a clock that the test sets."""

import time

import pytest

from p828.system.timing import DeviceSpan


@pytest.mark.parametrize("waited, expected", [(5.0, 6.0), (0.2, 6.0), (0.1, 0.1), (0.0, 0.0)])
def test_a_device_that_the_host_need_not_wait_for_was_not_busy(
    monkeypatch: pytest.MonkeyPatch, waited: float, expected: float
) -> None:
    """A step of two micro-batches, the first at 10.0, whose end the host sees at 16.0."""
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    span = DeviceSpan()
    assert span.end(0.0, is_gpu=True) is None, "nothing began"
    span.begin()
    span.pause()
    now = 11.0
    span.begin()
    now = 16.0
    assert span.end(waited, is_gpu=True) == expected
    assert span.end(waited, is_gpu=True) is None, "the next step has not begun"


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
        assert span.end(0.0, is_gpu=False) == 2.5
