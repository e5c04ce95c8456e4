import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from p828.config import Config
from p828.errors import ConfigError
from p828.optim.parts import PARTS
from p828.runs import records
from p828.runs.records import Recorder
from p828.train.log.panels import panels
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers
from tracker_records import FINDING


class StandIn:
    """A tracker that keeps what it is given, waits at `gate` before each row, and raises at some rows."""

    key, name, where, problem = "stand_in", "Stand-in", "here", ""

    def import_library(self) -> None: ...

    def __init__(self, fails_at: int = 0, refused: Exception | None = None) -> None:
        self.fails_at, self.refused = fails_at, refused
        self.calls: list[tuple[str, Any]] = []
        self.gate: threading.Event | threading.Barrier = threading.Event()
        self.gate.set()
        self.is_abandoned = False

    def start(self) -> None:
        self.gate.wait()
        if self.refused is not None:
            raise self.refused

    def write(self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        self.gate.wait()
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.calls.append(("write", step))

    def samples(self, step: int, samples: Sequence[Sequence[str]]) -> None:
        self.calls.append(("samples", samples))

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        self.calls.append(("alert", finding["rule"]))

    def rewind(self, step: int) -> None:
        self.calls.append(("rewind", step))

    def update(self, config: Config) -> None:
        self.calls.append(("update", config.name))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))

    def abandon(self) -> None:
        self.is_abandoned = True


def written(run_dir: Path, queued: QueuedTracker, steps: int) -> list[int]:
    """The steps in metrics.jsonl after a run of so many was recorded, with this tracker beside the file."""
    with Recorder(run_dir, mirror=Trackers([queued])) as recorder:
        for step in range(1, steps + 1):
            recorder.write("step", step, loss=1.0)
    return [record["step"] for record in records.read(run_dir / "metrics.jsonl")]


def test_records_reach_a_tracker_in_their_order(tmp_path: Path) -> None:
    tracker = StandIn()
    queued = QueuedTracker(tracker)
    queued.start()
    mirror = Trackers([queued])
    mirror.update(Config(name="run"))
    with Recorder(tmp_path, mirror=mirror) as recorder:
        recorder.write("step", 1, loss=1.0)
        recorder.write("event", 1, event="saved")
        recorder.write("finding", 1, **FINDING)
        recorder.write("step", 2, loss=1.0)
        recorder.write("sample", 2, samples=[["a", "b"]])
        recorder.rewind(1)
        recorder.write("step", 2, loss=0.5)
    assert tracker.calls == [
        ("update", "run"), ("write", 1), ("alert", "divergence"), ("write", 2), ("samples", [["a", "b"]]),
        ("rewind", 1), ("write", 2), ("finish", 0),
    ]  # fmt: skip
    assert mirror.shown() == [("Stand-in", "here")]


def test_a_tracker_that_fails_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    tracker = StandIn(fails_at=3)
    queued = QueuedTracker(tracker)
    queued.start()
    with Recorder(tmp_path, mirror=Trackers([queued])) as recorder:
        for step in range(1, 6):
            recorder.write("step", step, loss=1.0)
        queued._thread.join()
        assert recorder.mirror is not None
        text = "Stand-in is left out from here on: [Errno 28] No space left on device"
        assert recorder.mirror.problems() == [("stand_in", text)]
        for step in range(6, 9):
            recorder.write("step", step, loss=1.0)
        assert recorder.mirror.problems() == []
    assert [record["step"] for record in records.read(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    assert tracker.calls == [("write", 1), ("write", 2)]
    assert tracker.is_abandoned


def test_a_tracker_that_blocks_gets_what_waits_up_to_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = StandIn()
    queued = QueuedTracker(tracker, most_rows=4)
    queued.start()
    tracker.gate.clear()
    with Recorder(tmp_path, mirror=Trackers([queued])) as recorder:
        recorder.write("step", 1, loss=1.0)
        while queued._calls.qsize():  # until the tracker is at its first row
            time.sleep(0.001)
        for step in range(2, 11):
            recorder.write("step", step, loss=1.0)  # nothing that would end this wait comes from elsewhere
        recorder.rewind(9)
        assert recorder.mirror is not None
        ((_, text),) = recorder.mirror.problems()
        assert text == "Stand-in does not keep up: rows are left out there; metrics.jsonl has them all"
        tracker.gate.set()
    steps = [*range(1, 6)]
    assert tracker.calls == [*(("write", step) for step in steps), ("rewind", 9), ("finish", 0)]
    assert capsys.readouterr().err == "p828: Stand-in did not keep up: 5 rows are missing there\n"


def test_a_tracker_that_hangs_is_told_of_once_while_the_run_goes_on(tmp_path: Path) -> None:
    """One that is told of at once, and one that has its half minute."""
    trackers = [StandIn(), StandIn()]
    mirror = Trackers([QueuedTracker(trackers[0], answer_within=0.0), QueuedTracker(trackers[1])])
    mirror.start(lambda text: None)
    said = mirror.problems()
    for tracker in trackers:
        tracker.gate.clear()
    with Recorder(tmp_path, mirror=mirror) as recorder:
        for step in range(1, 4):
            recorder.write("step", step, loss=1.0)
        until = time.monotonic() + 10
        while not said and time.monotonic() < until:  # until the tracker is at its first row
            said = mirror.problems()
        recorder.write("step", 4, loss=1.0)
        said += mirror.problems()
        for tracker in trackers:
            tracker.gate.set()
    text = "Stand-in has taken no row for 0 seconds, and 3 wait; the run goes on without waiting"
    assert said == [("stand_in", text)]
    for tracker in trackers:
        assert tracker.calls == [*(("write", step) for step in range(1, 5)), ("finish", 0)]


def test_a_tracker_that_hangs_at_its_start_is_told_of_as_late_only() -> None:
    tracker = StandIn()
    tracker.gate.clear()
    queued = QueuedTracker(tracker, answer_within=0.0)
    queued.start(within=0.0)
    queued.write("step", 1, {"loss": 1.0})
    assert [text.partition(";")[0] for text in queued.problems()] == ["Stand-in has not started in time"]
    tracker.gate.set()
    queued.begin_to_finish(0)
    queued.finish()
    assert queued.problems() == []


def test_a_tracker_that_never_answers_does_not_keep_a_run_from_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = StandIn(fails_at=1)
    queued = QueuedTracker(tracker, finish_within=0.2)
    queued.start()
    tracker.gate.clear()
    assert written(tmp_path, queued, 3) == [1, 2, 3]
    assert "Stand-in does not answer and is left as it is" in capsys.readouterr().err
    assert tracker.is_abandoned
    tracker.gate.set()
    queued._thread.join()
    assert queued.problems() == [], "nothing more, though its call fails now"


def test_an_interrupt_at_the_end_leaves_a_tracker_that_never_answers(tmp_path: Path) -> None:
    tracker = StandIn()
    queued = QueuedTracker(tracker)
    queued.start()
    tracker.gate.clear()
    queued.write("step", 1, {"loss": 1.0})
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        Trackers([queued]).finish(0)
    assert tracker.is_abandoned
    tracker.gate.set()


def test_a_tracker_that_does_not_start_in_time_gets_its_rows_later(tmp_path: Path) -> None:
    tracker = StandIn()
    tracker.gate.clear()
    queued = QueuedTracker(tracker)
    queued.start(within=0.1)
    (text,) = queued.problems()
    assert text.startswith("Stand-in has not started in time")
    threading.Timer(0.1, tracker.gate.set).start()
    assert written(tmp_path, queued, 3) == [1, 2, 3]
    assert tracker.calls == [("write", 1), ("write", 2), ("write", 3), ("finish", 0)]


def test_what_the_user_has_to_mend_ends_the_start_and_other_errors_do_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key"):
        QueuedTracker(StandIn(refused=ConfigError("no key"))).start()
    queued = QueuedTracker(StandIn(refused=RuntimeError("its database is locked")))
    queued.start()
    assert queued.problems() == ["Stand-in does not start, and is left out: its database is locked"]
    assert written(tmp_path, queued, 2) == [1, 2]


def test_a_tracker_that_is_refused_late_is_told_of(tmp_path: Path) -> None:
    tracker = StandIn(refused=ConfigError("no key"))
    tracker.gate.clear()
    queued = QueuedTracker(tracker)
    queued.start(within=0.1)
    tracker.gate.set()
    queued._thread.join()
    assert queued.problems()[1:] == ["Stand-in does not start: no key"]
    assert written(tmp_path, queued, 2) == [1, 2]


def test_trackers_that_have_started_are_finished_where_another_one_is_refused() -> None:
    first, second = StandIn(), StandIn(refused=ConfigError("no key"))
    with pytest.raises(ConfigError, match="no key"):
        Trackers([QueuedTracker(first), QueuedTracker(second)]).start(lambda text: None)
    assert first.calls == [("finish", 1)]


def test_trackers_start_side_by_side() -> None:
    """Each starts once the other has begun to."""
    first, second = StandIn(), StandIn()
    first.gate = second.gate = threading.Barrier(2)
    trackers = Trackers([QueuedTracker(first), QueuedTracker(second)])
    trackers.start(lambda text: None)
    assert trackers.problems() == []


def test_numbers_are_grouped() -> None:
    values: dict[str, Any] = {
        "loss": 2.0, "mfu": None, "tokens_per_second": 10, "rank_memory_bytes": [5, 6], "load": [[1, 2]],
        "balance": [0.5, 0.25], "sink_mean": [0.1], "grad_norms": dict.fromkeys(PARTS[:2], 1.0),
        "low_bits": {"head": 0.5}, "rows": "0a",
        "source_tokens": {"web": 7}, "aux_loss": 0.5, "loss_of_tomorrow": 3.0,
    }  # fmt: skip
    assert panels("step", values) == {
        "train/loss": 2.0, "perf/tokens_per_second": 10, "perf/rank_memory_bytes/rank_0": 5,
        "perf/rank_memory_bytes/rank_1": 6, "moe/balance": 0.25, "moe/balance/layer_0": 0.5,
        "moe/balance/layer_1": 0.25, "health/sink_mean/layer_0": 0.1, "health/grad_norms/embedding": 1.0,
        "health/grad_norms/attention": 1.0, "health/low_bits/head": 0.5,
        "train/source_tokens/web": 7, "moe/aux_loss": 0.5, "train/loss_of_tomorrow": 3.0,
    }  # fmt: skip
    assert panels("eval", {"loss": 1.0, "best": True}) == {"val/loss": 1.0, "val/best": 1}
    assert panels("probe", {"future_leak": 0.0}) == {"health/future_leak": 0.0}
    assert panels("tasks", {"results": {"letters": {"acc": 0.5}}}) == {"val/letters/acc": 0.5}
    assert panels("step", {"bias_max": [None, 1.0]}) == {"moe/bias_max": 1.0, "moe/bias_max/layer_1": 1.0}
