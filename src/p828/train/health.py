"""The rules of run health at work: a run looks at its own records, and says what it finds once."""

import dataclasses
import time
import traceback
from collections.abc import Sequence
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
    _next_look: float = 0.0
    _is_disk_due: bool = True
    _is_broken: bool = False

    def begin(self) -> None:
        """Take in the records that there are: of a run that is resumed, or was rolled back."""
        self.window = Window(self.facts)
        recorder = self.log.recorder
        if recorder.is_quiet:
            return
        with self.log.console.waiting("reading the records so far, for the rules of run health"):
            for record in readable(recorder.path.parent):
                self.window.add(record)
                if record["kind"] == "finding" and (finding := finding_of(record)) is not None:
                    self._remember(finding)
        recorder.follower = self

    def add(self, record: Record) -> None:
        """Take in a record as it is written."""
        self.window.add(record)
        if record["kind"] == "event" and record.get("event") == "saved":
            self._is_disk_due = True
        if record["kind"] in ("eval", "probe") or not self.window.is_finite:
            self._next_look = 0.0

    def look(self, state: TrainState, batches: Sequence[Batch]) -> Finding | None:
        """Have the rules look at the records, if it is time, and stop the run at what is critical if so configured.

        `batches` are this rank's of the last step. Returns the finding for which the run is to be rolled back, if any.
        Raises RunStopped.
        """
        if self._is_odd(state.step):
            named_rows = named(traced_rows(batches, self.source_names, self.tokenizer))
            self.log.event("odd_batch", state.step, data=named_rows)
        new = self.tell()
        if self.config.on_critical == "continue":
            return None
        critical = self.rollback.ranks.on_rank_0(lambda: next((f for f in new if f.severity == "critical"), None))
        if critical is not None and self.config.on_critical == "stop":
            what = f'{critical.rule} at step {critical.step} (health.on_critical = "stop"): {critical.evidence}'
            self.rollback.stop(state, what, f"To do: {critical.remedy}")
        return critical if critical is not None and critical.rule in ROLLED_BACK else None

    def tell(self, is_last: bool = False) -> list[Finding]:
        """Record and show what is found and was not told yet, and return it; nothing if it is not time to look."""
        started = time.monotonic()
        if self.log.recorder.is_quiet or self._is_broken or (started < self._next_look and not is_last):
            return []
        try:
            if self._is_disk_due:
                self.window.disk, self._is_disk_due = look(self.log.recorder.path.parent), False
            findings = examine(self.window)
        except P828Error:
            raise
        except Exception as error:  # a rule that cannot deal with a number must not end a run of weeks
            self._is_broken = True
            text = f"the rules of run health failed and are left out from here on: {type(error).__name__}: {error}"
            where = "".join(traceback.format_exception(error)).rstrip()
            self.log.event("health_failed", self.window.step, text, traceback=where)
            self.log.console.log(where)
            return []
        new = [finding for finding in findings if self._is_new(finding)]
        for finding in findings:
            self._remember(finding)
        for finding in new:
            self.log.finding(finding)
        ended = time.monotonic()
        self._next_look = ended + (ended - started) / SHARE
        return new

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

    def _remember(self, finding: Finding) -> None:
        """Keep the step at which it was last found, with the worst that was told of it."""
        before = self.told.get(finding.rule)
        if before is not None and before.is_worse_than(finding):
            finding = dataclasses.replace(finding, severity=before.severity)
        self.told[finding.rule] = finding
