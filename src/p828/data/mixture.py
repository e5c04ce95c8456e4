"""Which source each row of the run comes from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Protocol

from p828.data.sample import Sample


class SampleSource(Protocol):
    """Rows of one source for micro-batches that are numbered over all ranks: `Streams` or `ShuffledTokenDataset`."""

    def take(self, batch: int, count: int) -> list[Sample]:
        """The source's next `count` rows, for micro-batch number `batch`."""
        ...

    def skip(self, batch: int, count: int) -> None:
        """Leave these rows to the rank that has that micro-batch."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SampleOrder:
    """Endless iterator of this rank's micro-batches, as lists of rows.

    Micro-batches are numbered over all ranks; rank r has those ≡ r modulo their number. A row comes from the source
    that is furthest behind its weight: every rank computes this for all rows of the run, so the sequence is the same
    for any number of ranks.

    Args:
        sources: without a mixture, one.
        schedule: step from which weights hold, and one weight for each source; the first step is 0.
        micro_batch_size: rows of a micro-batch.
        batches_per_step: micro-batches of a step on all ranks.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        schedule: Sequence[tuple[int, Sequence[float]]],
        micro_batch_size: int,
        batches_per_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources = sources
        self.schedule = schedule
        self.micro_batch_size = micro_batch_size
        self.batches_per_step = batches_per_step
        self.rank = rank
        self.world_size = world_size
        self._batch = 0
        self._first = (0, 0)  # micro-batch and step that steps are counted from
        self._weights = list(schedule[0][1])
        self._chosen = [0] * len(sources)  # rows since these weights hold

    def __iter__(self) -> Iterator[list[Sample]]:
        return self

    def __next__(self) -> list[Sample]:
        """Raises what reading the rows raises."""
        own: list[Sample] = []
        for rank in range(self.world_size):
            order = self._choose()
            for number, source in enumerate(self.sources):
                count = order.count(number)
                if rank == self.rank:
                    rows = source.take(self._batch, count)
                    own += rows if len(self.sources) == 1 else [replace(row, source=number) for row in rows]
                else:
                    source.skip(self._batch, count)
            self._batch += 1
        return own

    def state_dict(self) -> dict[str, Any]:
        step, done = self._step()
        return {
            "batch": self._batch,
            "step": step,
            "batches_of_step": done,
            "weights": self._weights,
            "chosen": list(self._chosen),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, with any number of ranks after a step. Raises ConfigError if a source is not that of the state."""
        counts = {len(state[key]) for key in ("sources", "weights", "chosen")}
        if counts != {len(self.sources)}:
            raise ValueError(f"data: a place in other than {len(self.sources)} sources")
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self._batch = state["batch"]
        self._first = (self._batch - state["batches_of_step"], state["step"])
        self._weights, self._chosen = state["weights"], list(state["chosen"])

    def _step(self) -> tuple[int, int]:
        """Steps before the next micro-batch's, and micro-batches of its step before it."""
        batch, step = self._first
        steps, batches = divmod(self._batch - batch, self.batches_per_step)
        return step + steps, batches

    def _choose(self) -> list[int]:
        """Sources of the next micro-batch's rows."""
        step, _ = self._step()
        weights = next(list(weights) for begin, weights in reversed(self.schedule) if begin <= step)
        if weights != self._weights:
            self._weights, self._chosen = weights, [0] * len(self.sources)
        total = sum(weights)
        order = []
        for _ in range(self.micro_batch_size):
            place = sum(self._chosen) + 1
            behind = [weight / total * place - n for weight, n in zip(weights, self._chosen, strict=True)]
            # a weight of 0 is never behind, but may be the equal of one that is not
            source = max((i for i, weight in enumerate(weights) if weight), key=behind.__getitem__)
            self._chosen[source] += 1
            order.append(source)
        return order


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state for any number of ranks from those of all ranks after the same step."""
    by_source = zip(*(state["sources"] for state in states), strict=True)
    return {**states[0], "sources": [_merged_source(of_ranks) for of_ranks in by_source]}


def _merged_source(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each stream's state from the rank that has read furthest in it.

    Prepared data is at the same place on all ranks; each of them has compared a part of its files.
    """
    if "streams" not in states[0]:
        return {**states[0], "checked": {name: seen for state in states for name, seen in state["checked"].items()}}
    by_stream = zip(*(state["streams"] for state in states), strict=True)
    streams = [max(of_ranks, key=itemgetter("given")) for of_ranks in by_stream]
    bad = [max(of_ranks) for of_ranks in zip(*(state["bad_records"] for state in states), strict=True)]
    return {"streams": streams, "bad_records": bad, "stopped": [at for state in states for at in state["stopped"]]}


def at_step(state: dict[str, Any], step: int) -> dict[str, Any]:
    """The same place in the data for the step after `step` of the run, whose weights a mixture then has."""
    return {**state, "step": step, "batches_of_step": 0}


def is_stopped(state: dict[str, Any]) -> bool:
    """Whether reading ended at a bad record, which may be mended."""
    return any(source.get("stopped") for source in state["sources"])


def bad_records(state: dict[str, Any]) -> list[int]:
    """Bad records that were passed over so far, by stream."""
    return [count for source in state["sources"] for count in source.get("bad_records", [])]


def held_out_rules(state: dict[str, Any]) -> list[bool | None]:
    """Whether the ends of documents are held out of each source (`DocumentStream.by_end`); None of prepared data."""
    rules: list[bool | None] = []
    for source in state["sources"]:
        first = source["streams"][0]["rows"]["packer"]["stream"] if "streams" in source else None
        rules.append(first and first.get("by_end", False))
    return rules
