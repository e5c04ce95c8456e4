"""How long a GPU was at work in a step, by a clock that the test sets."""

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
    assert span.end(0.0) is None, "nothing began"
    span.begin()
    now = 11.0
    span.begin()
    now = 16.0
    assert span.end(waited) == expected
    assert span.end(waited) is None, "the next step has not begun"
