"""A tracker behind a queue: whatever its library does, the run neither stops nor waits for it."""

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from p828.config import Config
from p828.errors import ConfigError
from p828.train.log.panels import SAMPLE, expert_loads, panels

QUEUED_ROWS = 1000  # some 20 MB in a model of 24 layers
START_WITHIN = 30.0  # seconds, all trackers together; one that takes longer gets the rows when it has started
ANSWER_WITHIN = 30.0  # seconds for one call; of a tracker that takes longer the run is told
FINISH_WITHIN = 60.0  # seconds to take what is left
LOOK_EVERY = 0.1  # seconds


class Tracker(Protocol):
    """A library that shows the numbers of runs. One thread calls all of it, but for `abandon`."""

    key: str
    """What its events are called in the records."""
    name: str
    """What its users call it."""
    where: str
    """Where the run is shown, or how to see it; known once it has started."""
    problem: str
    """What the run should report of a tracker that works; empty without it, and once it is reported."""

    def import_library(self) -> None:
        """Raises ConfigError where that fails, with what to do in its second line."""

    def start(self) -> None:
        """Begin or continue the run's board. Raises ConfigError for what the user has to set otherwise."""

    def write(self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """Show the numbers and each layer's `loads` of experts, by the names that `panels.py` gives them."""

    def samples(self, step: int, samples: Sequence[Sequence[str]]) -> None:
        """Show the continued prompts, as `panels.SAMPLES`: pairs of a prompt and its continuation."""

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        """Tell of a finding of the rules of run health, as its record has it."""

    def rewind(self, step: int) -> None:
        """The run goes on after `step`: later ones come again."""

    def update(self, config: Config) -> None:
        """Show the configuration."""

    def finish(self, exit_code: int) -> None:
        """Take what is left. An exit code other than 0 marks the run as failed."""

    def abandon(self) -> None:
        """Called where it did not finish, or failed: see to it that nothing of it keeps this process from ending."""


class QueuedTracker:
    """Hands a tracker its calls in a thread of its own, in their order.

    Where it does not keep up, rows are left out once `most_rows` wait; where it raises, it is left out from then on.
    `problems` says so, and once that a call has taken more than `answer_within` seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        most_rows: int = QUEUED_ROWS,
        answer_within: float = ANSWER_WITHIN,
        finish_within: float = FINISH_WITHIN,
    ) -> None:
        self.tracker = tracker
        self._most_rows, self._answer_within, self._finish_within = most_rows, answer_within, finish_within
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._refused: ConfigError | None = None
        self._has_started, self._has_ended = threading.Event(), threading.Event()
        self._is_late, self._has_failed, self._has_hung = False, False, False
        self._busy_since: float | None = None
        self._end = math.inf
        self._left_out = 0  # rows
        self._thread = threading.Thread(target=self._run, name=f"p828 {tracker.key}", daemon=True)

    def begin_to_start(self) -> None:
        self._thread.start()

    def start(self, within: float = START_WITHIN) -> None:
        """Start the tracker, unless that has begun, and wait for at most `within` seconds. Raises ConfigError."""
        if self._thread.ident is None:
            self.begin_to_start()
        if not self._has_started.wait(within):
            self._is_late = True
            self._report("has not started in time; the run goes on, and it gets the rows when it has")
        if self._refused is not None:
            raise self._refused

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Have the tracker show a record's numbers or samples. The values must not change any more."""
        if self._has_failed:
            return
        if self._calls.qsize() >= self._most_rows:
            self._left_out += 1
            if self._left_out == 1:
                self._report("does not keep up: rows are left out there; metrics.jsonl has them all")
            return
        self._calls.put((self._write, (kind, step, values)))

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the thread make one of the rare calls of the tracker, which are never left out."""
        if not self._has_failed:
            self._calls.put((function, arguments))

    def problems(self) -> list[str]:
        """What the run should report, once. To be asked at every step: of a tracker that hangs, nothing else tells."""
        self._report_hanging()
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._problems.get_nowait())
        if self.tracker.problem:
            found.append(self.tracker.problem)
            self.tracker.problem = ""
        return found

    def begin_to_finish(self, exit_code: int) -> None:
        """Have the tracker take what is left, for which it has `finish_within` seconds from now."""
        self._end = time.monotonic() + self._finish_within
        self.call(self.tracker.finish, exit_code)
        self._calls.put(None)

    def finish(self) -> None:
        """Wait until the tracker has taken what is left, unless that takes too long."""
        while not (self._has_ended.wait(LOOK_EVERY) or self._is_stuck() or time.monotonic() > self._end):
            pass
        if not self._has_ended.is_set():
            left = self._calls.qsize()
            self._report(f"does not answer and is left as it is; about {left} rows are missing there")
            self.abandon()
        elif self._left_out:
            self._report(f"did not keep up: {self._left_out} rows are missing there")

    def abandon(self) -> None:
        """Leave the tracker as it is, if it has not finished."""
        self._has_failed = True
        if not self._has_ended.is_set():
            self.tracker.abandon()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == SAMPLE:
            self.tracker.samples(step, values["samples"])
        else:
            self.tracker.write(step, panels(kind, values), expert_loads(values))

    def _is_stuck(self) -> bool:
        return self._busy_seconds() > self._finish_within

    def _busy_seconds(self) -> float:
        """For how long the tracker has been at the call that it is at; 0 where it is at none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _report_hanging(self) -> None:
        seconds = self._busy_seconds()
        if seconds <= self._answer_within or self._has_hung or self._has_failed or not self._has_started.is_set():
            return
        self._has_hung = True
        rows = 1 + self._calls.qsize()  # with the one that it is at
        self._report(f"has taken no row for {seconds:.0f} seconds, and {rows} wait; the run goes on without waiting")

    def _run(self) -> None:
        try:
            self._work()
        finally:
            # beside the thread's own state: an interrupted `join` takes a thread at work for an ended one (Python 3.11)
            self._has_ended.set()

    def _work(self) -> None:
        try:
            self._busy_since = time.monotonic()
            self.tracker.start()
        except ConfigError as error:
            self._refused, self._has_failed = error, True
            if self._is_late:
                self._report(f"does not start: {error}")
        except (Exception, SystemExit) as error:  # any of its own, of a library that the run does not depend on
            self._fail("does not start, and is left out", error)
        self._busy_since = None
        self._has_started.set()
        while not self._has_failed:
            call = self._calls.get()
            if call is None:
                return
            self._busy_since = time.monotonic()
            try:
                function, arguments = call
                function(*arguments)
            except (Exception, SystemExit) as error:  # as above
                self._fail("is left out from here on", error)
            self._busy_since = None

    def _fail(self, what: str, error: BaseException) -> None:
        if self._has_failed:
            return  # it was left as it is, which has been reported
        text = " ".join(str(error).split()) or type(error).__name__
        self._has_failed = True
        self._report(f"{what}: {text}")
        with suppress(Exception):
            self.tracker.abandon()

    def _report(self, text: str) -> None:
        self._problems.put(f"{self.tracker.name} {text}")
