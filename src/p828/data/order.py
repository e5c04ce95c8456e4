"""Which sample comes when, from which source, and for which rank.

Every rank computes the order of all samples of the run: `SampleOrder` chooses each sample's source, a source gives its
samples in an order of its own. Sources of text are `TextStreams` of `SampleShuffler`s; prepared tokens are a
`tokens.read.ShuffledTokenDataset`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from p828.data.batch import Sample
from p828.data.text.documents import DocumentStream, permutation
from p828.data.text.packing import Packing
from p828.errors import ConfigError, DataError


def source_seed(seed: int, number: int) -> int:
    """A seed for each of several sources or streams, lest all shuffle alike; the run's own for the first."""
    return int(np.random.PCG64((seed, number)).random_raw()) if number else seed


class SampleShuffler:
    """Endless iterator over a packer's samples, in blocks of up to `size`, in an order drawn from (seed, block number).

    A block ends with the epoch, so that no sample comes again before all have come; a sample that spans two epochs
    belongs to the first. While a block is consumed, the next one is read, a sample for a sample, so that no batch waits
    for a whole block. The state is the packer's before the current block and how many of its samples were consumed: no
    sample is stored, the block is read again on load.
    """

    def __init__(self, packer: Packing, size: int, seed: int) -> None:
        self.packer, self.size, self.seed = packer, size, seed
        self._restart(packer.state_dict(), block=0, consumed=0)

    def _restart(self, packer_state: dict[str, Any], block: int, consumed: int) -> None:
        self._begin, self._block, self._consumed = packer_state, block, consumed
        self._current: list[Sample] = []
        self._ahead_begin, self._ahead = packer_state, list[Sample]()
        self._beyond: tuple[dict[str, Any], Sample] | None = None  # the first sample of the epoch after `_ahead`

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        """Raises what the packer raises."""
        if not self._current:
            self._begin_block()
            if not 0 <= self._consumed <= len(self._current):
                raise DataError(
                    f"{self._consumed} rows of a block of {len(self._current)} were given: no place in the data"
                )
        elif self._consumed == len(self._current):
            self._block, self._consumed = self._block + 1, 0
            self._begin_block()
        self._read_ahead()
        sample = self._current[self._order[self._consumed]]
        self._consumed += 1
        return sample

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample consumed."""
        if self._current and self._consumed == len(self._current):
            return {"packer": self._ahead_begin, "block": self._block + 1, "given": 0}
        return {"packer": self._begin, "block": self._block, "given": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError as the packer's."""
        self.packer.load_state_dict(state["packer"])
        self._restart(state["packer"], state["block"], state["given"])

    def _begin_block(self) -> None:
        while not self._is_read():
            self._read_ahead()
        self._begin, self._current = self._ahead_begin, self._ahead
        self._order = permutation(len(self._current), (self.seed, self._block, 0, 1))  # documents have keys of three
        if self._beyond is None:
            self._ahead_begin, self._ahead = self.packer.state_dict(), []
        else:
            self._ahead_begin, self._ahead = self._beyond[0], [self._beyond[1]]
            self._beyond = None

    def _is_read(self) -> bool:
        return len(self._ahead) == self.size or self._beyond is not None

    def _read_ahead(self) -> None:
        """Read one sample into the next block, unless that is complete."""
        if self._is_read():
            return
        state, sample = self.packer.state_dict(), next(self.packer)
        if self._ahead and sample.epoch != self._ahead[0].epoch:
            self._beyond = state, sample
        else:
            self._ahead.append(sample)


class SampleSource(Protocol):
    """Samples of one source for micro-batches that are numbered over all ranks."""

    def take(self, batch: int, count: int) -> list[Sample]:
        """The source's next `count` samples, for micro-batch number `batch`."""
        ...

    def skip(self, batch: int, count: int) -> None:
        """Leave the next `count` samples to the rank that has micro-batch number `batch`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class _Stream:
    samples: SampleShuffler
    consumed: int = 0
    """Samples that this rank has read."""
    issued: int = 0
    """Samples that were issued to all ranks: this rank passes over those beyond `consumed` before it reads on."""


class TextStreams:
    """A `SampleSource` of text that is tokenized on the way.

    Micro-batch m, counted over all ranks, takes its samples from stream m modulo the number of streams. So the order is
    the same for any number of ranks. Where that number divides the number of streams, each rank reads streams of its
    own; otherwise several ranks read the same stream, and pass over what belongs to the others.
    """

    def __init__(self, streams: Sequence[SampleShuffler], documents: Sequence[DocumentStream] = ()) -> None:
        """`documents` are what each stream's samples are packed from."""
        self.streams = [_Stream(samples) for samples in streams]
        self.documents = documents
        self._stopped: list[dict[str, Any]] = []
        for stream in documents:
            # All states share one list. Reading ends at a bad record ahead of the step that is trained, and the run
            # goes on from an earlier batch's state, which has to know of that record, too.
            stream.stopped = self._stopped

    def take(self, batch: int, count: int) -> list[Sample]:
        """The next `count` samples, for micro-batch number `batch`. Raises what reading them raises."""
        stream = self.streams[batch % len(self.streams)]
        while stream.consumed < stream.issued:
            next(stream.samples)
            stream.consumed += 1
        stream.issued += count
        stream.consumed += count
        return [next(stream.samples) for _ in range(count)]

    def skip(self, batch: int, count: int) -> None:
        self.streams[batch % len(self.streams)].issued += count

    def state_dict(self) -> dict[str, Any]:
        return {
            "streams": [
                {"given": stream.consumed, "wanted": stream.issued, "rows": stream.samples.state_dict()}
                for stream in self.streams
            ],
            "bad_records": [stream.bad_records for stream in self.documents],
            "stopped": self._stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `DocumentStream.load_state_dict`, and if the state is of prepared data."""
        if "streams" not in state:
            raise ConfigError("data.prepared is empty: the run was trained on prepared data. Give its directory")
        self._stopped[:] = state.get("stopped", [])
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.samples.load_state_dict(saved["rows"])
            stream.consumed, stream.issued = saved["given"], saved["wanted"]
        self._stopped.clear()  # the record that was mended is an ordinary one now


class SampleOrder:
    """Endless iterator of this rank's micro-batches, as lists of samples.

    Micro-batches are numbered over all ranks; rank r has those ≡ r modulo the number of ranks. A sample comes from the
    source that is furthest behind its weight. Every rank computes this for all samples of the run, so the sequence is
    the same for any number of ranks.

    Args:
        sources: without a mixture, one.
        schedule: step from which weights hold, and one weight for each source; the first step is 0.
        micro_batch_size: samples of a micro-batch.
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
        self._chosen = [0] * len(sources)  # samples since these weights hold

    def __iter__(self) -> Iterator[list[Sample]]:
        return self

    def __next__(self) -> list[Sample]:
        """Raises what reading the samples raises."""
        own: list[Sample] = []
        for rank in range(self.world_size):
            chosen = self._choose()
            for number, source in enumerate(self.sources):
                count = chosen.count(number)
                if rank == self.rank:
                    samples = source.take(self._batch, count)
                    own += samples if len(self.sources) == 1 else [replace(one, source=number) for one in samples]
                else:
                    source.skip(self._batch, count)
            self._batch += 1
        return own

    def skip(self, batches: int) -> None:
        """Leave the next micro-batches to no rank; text is read past them once a sample is asked for."""
        for _ in range(batches):
            chosen = self._choose()
            for number, source in enumerate(self.sources):
                source.skip(self._batch, chosen.count(number))
            self._batch += 1

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
        """Go on there, with any number of ranks if it is the end of a step.

        Raises ConfigError if a source is not that of the state.
        """
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
        """Sources of the next micro-batch's samples."""
        step, _ = self._step()
        weights = next(list(weights) for begin, weights in reversed(self.schedule) if begin <= step)
        if weights != self._weights:
            self._weights, self._chosen = weights, [0] * len(self.sources)
        total = sum(weights)
        chosen = []
        for _ in range(self.micro_batch_size):
            place = sum(self._chosen) + 1
            behind = [weight / total * place - n for weight, n in zip(weights, self._chosen, strict=True)]
            # a source of weight 0 is never behind, but may be level with another
            source = max((i for i, weight in enumerate(weights) if weight), key=behind.__getitem__)
            self._chosen[source] += 1
            chosen.append(source)
        return chosen


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state for any number of ranks from those of all ranks after the same step."""
    by_source = zip(*(state["sources"] for state in states), strict=True)
    return {**states[0], "sources": [_merged_source(of_ranks) for of_ranks in by_source]}


def _merged_source(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each stream's state from the rank that has read furthest in it.

    Prepared data is at the same place on all ranks; each rank has compared a part of its files.
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
