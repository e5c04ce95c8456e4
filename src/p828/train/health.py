"""The rules of run health at work: a run looks at its own records, and says what it finds once."""

import dataclasses
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from p828.config import HealthConfig
from p828.data.batch import Batch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.trace import named, traced_rows
from p828.errors import P828Error
from p828.health.disk import look
from p828.health.examine import examine
from p828.health.facts import Facts
from p828.health.finding import Finding, finding_of
from p828.health.of_run import readable
from p828.health.window import Record, Window
from p828.runs.train_state import TrainState
from p828.train.log.log import Log
from p828.train.rollback import Rollback

SHARE = 0.005  # of the run's time that the rules may take
GONE_STEPS = 500  # after so many steps without it, a finding that comes back is told again
WATCH, NAMING = "the watch over run health", "the naming of odd data"
ROLLED_BACK = ("spike_unrecovered", "divergence", "non_finite", "non_finite_applied")
"""The findings from which going back and leaving data out helps."""


@dataclass
class HealthWatch:
    """Follows the records of a run, and has the rules look at them as often as costs 0.5 % of its time at most.

    Rank 0 has the records, and decides for all ranks.
    """

    config: HealthConfig
    facts: Facts
    log: Log
    rollback: Rollback
    source_names: Sequence[str]
    tokenizer: Tokenizer
    window: Window = field(init=False)
    told: dict[str, Finding] = field(default_factory=dict)
    """What was told, by rule, with the step at which it was last found."""
    _found: Sequence[Finding] = ()
    """What the rules found since the last step."""
    _next_look: float = 0.0
    _is_disk_due: bool = True
    failed: dict[str, Exception] = field(default_factory=dict)
    """Why a rule, or another part of this, is left out from here on, by its name."""

    def begin(self) -> None:
        """Take in the records that there are: of a run that is resumed, or was rolled back."""
        self.window, self.told, self._found = Window(self.facts), {}, ()
        recorder = self.log.recorder
        recorder.follower = None
        if recorder.is_quiet or WATCH in self.failed:
            return
        waiting = self.log.console.waiting("reading the records so far, for the rules of run health")
        with self._surviving(WATCH), waiting:
            for record in readable(recorder.path.parent):
                self.window.add(record)
                if record["kind"] == "finding" and (finding := finding_of(record)) is not None:
                    self._remember(finding)
                if record.get("event") in ("rollback", "resume"):
                    self._forget_after(record["step"])
            self._forget_after(self.window.step)
            recorder.follower = self

    def add(self, record: Record) -> None:
        """Take in a record as it is written."""
        if WATCH in self.failed:
            return
        with self._surviving(WATCH):
            self.window.add(record)
            if record["kind"] == "event" and record.get("event") == "saved":
                self._is_disk_due = True
            if record["kind"] in ("eval", "probe") or not self.window.is_finite:
                self._next_look = 0.0

    def look(self) -> None:
        """Have the rules look at the records of the steps so far, if it is time: while a GPU is at work on the next."""
        self._found = self._tell()

    def after_step(self, state: TrainState, batches: Sequence[Batch]) -> Finding | None:
        """Name the data of an odd step, and stop the run at what the last look found critical if so configured.

        `batches` are this rank's of the step. Returns the finding for which the run is to be rolled back, if any.
        What is critical counts whether it was told before or not. Raises RunStopped.
        """
        if not {WATCH, NAMING} & self.failed.keys():
            with self._surviving(NAMING):
                if self._is_odd(state.step):
                    named_rows = named(traced_rows(batches, self.source_names, self.tokenizer))
                    self.log.event("odd_batch", state.step, data=named_rows)
        return self._act(state, self._found)

    def end(self, state: TrainState) -> None:
        """Look a last time, after the last evaluation. Raises RunStopped."""
        self._act(state, self._tell(is_last=True))

    def _act(self, state: TrainState, found: Sequence[Finding]) -> Finding | None:
        """Stop the run at a critical finding if so configured, or return the one for which it is to be rolled back."""
        if self.config.on_critical == "continue":
            return None
        is_stopping = self.config.on_critical == "stop"
        bad = (f for f in found if f.severity == "critical" and (is_stopping or f.rule in ROLLED_BACK))
        critical = self.rollback.ranks.on_rank_0(lambda: next(bad, None))
        if critical is not None and is_stopping:
            what = f'{critical.rule} at step {critical.step} (health.on_critical = "stop"): {critical.evidence}'
            way_on = 'health.on_critical = "continue" goes on in spite of it'
            self.rollback.stop(state, what, f"To do: {critical.remedy}\n{way_on}")
        return critical

    def _tell(self, is_last: bool = False) -> list[Finding]:
        """Return what is found, and record and show what was not told yet; nothing if it is not time to look."""
        started = time.monotonic()
        if self.log.recorder.is_quiet or WATCH in self.failed or (started < self._next_look and not is_last):
            return []
        before, findings = set(self.failed), list[Finding]()
        with self._surviving(WATCH):
            if self._is_disk_due:
                self.window.disk, self._is_disk_due = look(self.log.recorder.path.parent), False
            findings = examine(self.window, self.failed)
            for name in self.failed.keys() - before:
                self._tell_failure(f"the rule {name}", self.failed[name])
        new = [finding for finding in findings if self._is_new(finding)]
        for finding in findings:
            self._remember(finding)
        for finding in new:
            self.log.finding(finding)
        ended = time.monotonic()
        self._next_look = ended + (ended - started) / SHARE
        return findings

    @contextmanager
    def _surviving(self, part: str) -> Iterator[None]:
        """Leave out the part from here on if it fails: a number that it cannot deal with must not end a run of weeks.

        Our own errors pass: the records cannot be written, for one.
        """
        try:
            yield
        except P828Error:
            raise
        except Exception as error:
            self.failed[part] = error
            self._tell_failure(part, error)

    def _tell_failure(self, part: str, error: Exception) -> None:
        text = f"{part} failed, and is left out from here on: {type(error).__name__}: {error}"
        where = "".join(traceback.format_exception(error)).rstrip()
        self.log.event("health_failed", self.window.step, text, traceback=where)
        self.log.console.log(where)

    def _is_odd(self, step: int) -> bool:
        """Whether the step began a spike, or was the first of some that were not finite: its data is named."""
        if self.log.recorder.is_quiet:
            return False
        spike, before = self.window.spikes.current, list(self.window.non_finite)[-2:-1]
        is_first = not self.window.is_finite and before != [step - 1]
        return is_first or (spike is not None and spike.step == step)

    def _is_new(self, finding: Finding) -> bool:
        """Whether it is worse than when it was told, or had been gone since."""
        before = self.told.get(finding.rule)
        return before is None or finding.is_worse_than(before) or finding.step - before.step > GONE_STEPS

    def _forget_after(self, step: int) -> None:
        """Count what was told of later steps as not told: these steps come again, or others in their place."""
        self.told = {rule: finding for rule, finding in self.told.items() if finding.step <= step}

    def _remember(self, finding: Finding) -> None:
        """Keep the step at which it was last found, with the worst that was told of it."""
        before = self.told.get(finding.rule)
        if before is not None and before.is_worse_than(finding):
            finding = dataclasses.replace(finding, severity=before.severity)
        self.told[finding.rule] = finding
