"""The part of a run's records that rules look at, bounded in size however long the run is."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p828.health.disk import Disk
from p828.health.facts import Facts
from p828.health.history import History
from p828.health.repeats import Repeats
from p828.health.spikes import Spikes
from p828.runs import records

Record = Mapping[str, Any]
RECENT = 256  # steps whose whole records are kept
FIRST = 64  # first steps of a run whose records are kept
GAP_STEPS, LATEST_STEPS = 64, 8  # whose mean loss an evaluation is compared with
MEASURED = 64  # of the steps with measurements that are not made in every step
ODD = 64  # of steps that were not finite
BY_PART = ("grad_norms", "weight_norms")
OTHERS = 256  # of evaluations, probes and events each


@dataclass(frozen=True)
class Gap:
    """An evaluation, beside the training at that time."""

    step: int
    validation: float
    """Validation loss."""
    training: float
    """Mean training loss of the 64 steps before."""
    latest: float
    """Mean training loss of the 8 steps before: while the loss falls, the other one lags behind."""


class Window:
    """Takes in a run's records one by one, in the order of `metrics.jsonl`.

    It keeps the last and the first steps whole, and of all others means over blocks of steps, and marks: spikes,
    repeated batches, steps that were not finite. What an earlier version did not record is missing here, too.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.step = 0
        """The last step that has a record."""
        self.recent: deque[Record] = deque(maxlen=RECENT)
        """The last steps' records."""
        self.first: list[Record] = []
        """The first steps' records."""
        self.measured: deque[Record] = deque(maxlen=MEASURED)
        """Of the steps of this start whose update was measured: every tenth or so, the last ones."""
        self.evaluations: deque[Record] = deque(maxlen=OTHERS)
        self.gaps: deque[Gap] = deque(maxlen=OTHERS)
        self.probes: deque[Record] = deque(maxlen=OTHERS)
        self.events: deque[Record] = deque(maxlen=OTHERS)
        self.data_of: dict[int, str] = {}
        """The documents of some odd steps' batches, in words, by step."""
        self.history = History()
        self.spikes = Spikes()
        self.repeats = Repeats()
        self.non_finite: deque[int] = deque(maxlen=OTHERS)
        """Steps whose loss or gradient norm was not finite."""
        self.num_non_finite = 0
        self.odd: list[Record] = []
        """The records of these steps, and of those that were not finite in a part of the model only; the first ones."""
        self.resumed_at: int | None = None
        """The step from which the run's last start went on; None in its first."""
        self.mixture_step = 0
        """The step after which the weights of the data's sources changed last."""
        self.disk: Disk | None = None
        """What the run's directory holds; None if nobody has looked."""

    def add(self, record: Record) -> None:
        """Take in a record of any kind; of kinds that no rule looks at, nothing is kept."""
        kind, step = record.get("kind"), record.get("step")
        if type(step) is not int:
            return
        if kind == "step":
            self._add_step(step, record)
        elif kind == "eval":
            self.evaluations.append(record)
            losses = self.numbers("loss", GAP_STEPS)
            if (validation := number_of(record, "loss")) is not None and len(losses) >= GAP_STEPS // 2:
                latest = math.fsum(losses[-LATEST_STEPS:]) / LATEST_STEPS
                self.gaps.append(Gap(step, validation, math.fsum(losses) / len(losses), latest))
        elif kind == "probe":
            self.probes.append(record)
        elif kind == "event":
            self._add_event(step, record)

    def last(self, steps: int) -> list[Record]:
        """The records of the last `steps` steps, as far as they are kept."""
        return list(self.recent)[-steps:]

    def numbers(self, name: str, steps: int) -> list[float]:
        """A scalar of the last `steps` steps, without those that lack it or where it is not finite."""
        found = (number_of(record, name) for record in self.last(steps))
        return [number for number in found if number is not None]

    def since_resume(self) -> list[Record]:
        """The recent records of the run's last start."""
        return [record for record in self.recent if record["step"] > (self.resumed_at or 0)]

    def names_data(self, step: int) -> str:
        """A sentence on the data of a step's batch."""
        command = f"p828 batch {self.facts.run} --step {step}"
        return f"Its data: {self.data_of[step]} ({command})" if step in self.data_of else f"Its data: {command}"

    @property
    def is_finite(self) -> bool:
        """Whether the last step's loss and gradient norm were finite."""
        return not self.non_finite or self.non_finite[-1] != self.step

    @property
    def is_bfloat16(self) -> bool:
        """Whether the layers compute in bfloat16, as far as the configuration and the records tell."""
        if self.facts.dtype != "auto":
            return self.facts.dtype == "bfloat16"
        return any(number_of(record, "mfu") is not None for record in self.first[:1])  # only a GPU has one

    def _add_step(self, step: int, record: Record) -> None:
        self.step = step
        self.recent.append(record)
        if len(self.first) < FIRST:
            self.first.append(record)
        if "update_ratios" in record:
            self.measured.append(record)
        loss = number_of(record, "loss")
        if loss is None or number_of(record, "grad_norm") is None:
            self.non_finite.append(step)
            self.num_non_finite += 1
            self._keep_odd(record)
        elif any(name in record and not _are_finite(parts_of(record, name)) for name in BY_PART):
            self._keep_odd(record)
        if step - 1 in self.facts.mixture_steps:
            self.mixture_step = step - 1
            self.spikes.begin_anew()
        if loss is not None:
            self.spikes.add(step, loss)
        self.history.add(step, record)
        self.repeats.add(step, record)

    def _keep_odd(self, record: Record) -> None:
        if len(self.odd) < ODD:
            self.odd.append(record)

    def _add_event(self, step: int, record: Record) -> None:
        if record.get("event") == "odd_batch":
            self.data_of[step] = str(record.get("data", ""))
            if len(self.data_of) > OTHERS:
                del self.data_of[min(self.data_of)]
            return
        self.events.append(record)
        if record.get("event") == "resume" and str(record.get("text", "")).startswith("resumed from step"):
            self.resumed_at = step
            self.measured.clear()


def number_of(record: Record, name: str) -> float | None:
    """A finite number of a record; None where it is missing, no number or not finite."""
    return records.finite_number(record.get(name))


def list_of(record: Record, name: str) -> list[float]:
    """A list of finite numbers, an entry a layer; empty where it is missing or has anything else in it."""
    return finite_list(record.get(name))


def finite_list(values: Any) -> list[float]:
    """The same for a value of a record, or an entry of one."""
    found = [records.finite_number(value) for value in values] if isinstance(values, list) else []
    return [] if None in found else [value for value in found if value is not None]


def parts_of(record: Record, name: str) -> dict[str, float]:
    """The numbers of a record's object, an entry a part of the model; without those that are no numbers.

    NaN and the infinities stay.
    """
    values = record.get(name)
    if not isinstance(values, dict):
        return {}
    return {part: found for part, value in values.items() if (found := records.number(value)) is not None}


def _are_finite(parts: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, parts.values()))
