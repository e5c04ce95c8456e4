import pytest

from p828.train.log.usage import Pace, in_words


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_steps_are_measured_from_the_end_of_the_first_and_told_once() -> None:
    clock = Clock()
    pace, told = Pace(clock), []
    for step in range(1, 8):
        clock.now += 60.0 if step == 1 else 3.0  # the first one compiles
        told.append(pace.seconds_per_step(step))
    assert [found for found in told if found is not None] == [pytest.approx(3.0)]


def test_a_long_step_is_measured_by_its_micro_batches() -> None:
    clock = Clock()
    pace = Pace(clock)
    for number in range(1, 17):
        clock.now += 38.0
        if (seconds := pace.seconds_per_step(number / 16)) is not None:
            break
    assert number == 2
    assert seconds == pytest.approx(16 * 38.0)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "1 second"), (90, "90 seconds"), (150, "2 minutes"), (3600, "60 minutes"), (7200, "2 hours"),
        (26 * 3600, "26 hours"), (41.2 * 86400, "41 days"),
    ],
)  # fmt: skip
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
