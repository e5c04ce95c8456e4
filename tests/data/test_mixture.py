import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from p828.data.batch import Batch, Sample
from p828.data.loader import Loader
from p828.data.order import SampleOrder


class Numbered:
    """A source whose rows hold their number."""

    def __init__(self) -> None:
        self.given = 0

    def take(self, batch: int, count: int) -> list[Sample]:
        self.given += count
        numbers = range(self.given - count, self.given)
        return [Sample(np.array([n, n]), np.zeros(2, dtype=np.int32)) for n in numbers]

    def skip(self, batch: int, count: int) -> None:
        self.given += count

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


Schedule = list[tuple[int, list[float]]]
CHANGING: Schedule = [(0, [1.0, 0.0, 0.0]), (5, [0.2, 0.5, 0.3]), (9, [0.0, 1.0, 3.0])]


def mixture(schedule: Schedule, rows: int, batches_per_step: int, rank: int = 0, world_size: int = 1) -> SampleOrder:
    sources = [Numbered() for _ in schedule[0][1]]
    return SampleOrder(sources, schedule, rows, batches_per_step, rank, world_size)


def seen(rows: list[Sample]) -> list[tuple[int, int]]:
    return sorted((row.source, int(row.tokens[0])) for row in rows)


def test_fractions_follow_the_weights_at_every_moment() -> None:
    weights = [0.5, 0.2, 0.3]
    counts: Counter[int] = Counter()
    mixed = mixture([(0, weights)], rows=1, batches_per_step=1)
    for n in range(1, 2000):
        counts[next(mixed)[0].source] += 1
        # As close as whole rows can be: never a whole row or more away.
        assert all(abs(counts[i] - weight * n) < 1 for i, weight in enumerate(weights))


def test_weights_change_at_their_steps() -> None:
    mixed = mixture(CHANGING, rows=4, batches_per_step=5)
    by_step = [Counter(row.source for _ in range(5) for row in next(mixed)) for _ in range(14)]
    assert all(counts == {0: 20} for counts in by_step[:5])
    assert all(counts == {0: 4, 1: 10, 2: 6} for counts in by_step[5:9])
    assert all(counts == {1: 5, 2: 15} for counts in by_step[9:])


def test_every_source_gives_its_rows_in_order() -> None:
    mixed = mixture(CHANGING, rows=3, batches_per_step=2)
    rows = [row for _ in range(60) for row in next(mixed)]
    for source in range(3):
        numbers = [int(row.tokens[0]) for row in rows if row.source == source]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_one_sequence(world_size: int) -> None:
    alone = mixture(CHANGING, rows=3, batches_per_step=6)
    ranks = [mixture(CHANGING, 3, 6, rank, world_size) for rank in range(world_size)]
    for batch in range(120):
        assert seen(next(ranks[batch % world_size])) == seen(next(alone))


def test_a_state_goes_on_with_another_number_of_ranks() -> None:
    alone = mixture(CHANGING, rows=3, batches_per_step=12)
    expected = [seen(next(alone)) for _ in range(12 * 16)]
    state, batch = mixture(CHANGING, 3, 12).state_dict(), 0
    for world_size in (2, 1, 4, 3, 6, 2, 12, 1):
        ranks = [mixture(CHANGING, 3, 12, rank, world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        for _ in range(2 * 12):  # two steps
            assert seen(next(ranks[batch % world_size])) == expected[batch]
            batch += 1
        states = [rank.state_dict() for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]


def test_after_new_weights_no_source_catches_up_on_the_old_ones() -> None:
    old = mixture([(0, [1.0, 0.0])], rows=4, batches_per_step=1)
    for _ in range(100):
        next(old)
    new = mixture([(0, [0.5, 0.5])], rows=4, batches_per_step=1)
    new.load_state_dict(old.state_dict())
    assert [Counter(row.source for row in next(new)) for _ in range(5)] == [{0: 2, 1: 2}] * 5


def test_steps_are_counted_on_when_their_size_changes() -> None:
    before = mixture(CHANGING, rows=2, batches_per_step=4)
    for _ in range(4 * 4):
        next(before)
    after = mixture(CHANGING, rows=2, batches_per_step=10)
    after.load_state_dict(before.state_dict())
    assert {row.source for _ in range(10) for row in next(after)} == {0}  # step 4
    assert {row.source for _ in range(10) for row in next(after)} == {0, 1, 2}  # step 5


def test_a_run_that_goes_back_has_its_steps_weights_and_the_data_that_comes_next() -> None:
    """Its batches that were made ahead for later steps are made again: no row is left out or comes twice."""
    mixed = mixture(CHANGING, rows=4, batches_per_step=5)
    with Loader(mixed, mask_documents=False, sources=3) as loader:
        given = [loader.__next__() for _ in range(5 * 7)]
        assert given[-1].source_tokens[0] < 4
        loader.go_on_at(3)
        state = loader.state_dict()
        given += [loader.__next__() for _ in range(5 * 4)]
        assert loader.state_dict()["step"] == 3 + 4
    after = given[5 * 7 :]
    assert all(batch.source_tokens == (4, 0, 0) for batch in after[:10]), "steps 3 and 4"
    assert [sum(counts) for counts in zip(*(batch.source_tokens for batch in after[10:15]), strict=True)] == [4, 10, 6]
    for source in range(3):
        rows = (row for batch in given for row in source_rows(batch, source))
        assert list(rows) == list(range(sum(batch.source_tokens[source] for batch in given)))
    resumed = mixture(CHANGING, rows=4, batches_per_step=5)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    for batch in after:
        assert sorted(int(row.tokens[0]) for row in next(resumed)) == sorted(batch.tokens_BS[:, 0].tolist())


def source_rows(batch: Batch, source: int) -> list[int]:
    """Numbers of a source's rows: which row is whose follows from the counts, as a batch has them in this order."""
    begin = sum(batch.source_tokens[:source])
    numbers: list[int] = batch.tokens_BS[begin : begin + batch.source_tokens[source], 0].tolist()
    return numbers
