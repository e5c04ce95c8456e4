"""The trackers that a run's configuration asks for, as the records' mirror: each gets the records' numbers."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.errors import ConfigError, warn
from p828.train.log.console import waiting
from p828.train.log.panels import FINDING, GROUPS, SAMPLE
from p828.train.log.tensorboard import TensorBoardTracker
from p828.train.log.tracker import START_WITHIN, QueuedTracker, Tracker
from p828.train.log.trackio import TrackioTracker
from p828.train.log.wandb import WandbTracker


class Trackers:
    """Fans the records out to trackers, which never stop or slow the run (`QueuedTracker`)."""

    def __init__(self, queued: Sequence[QueuedTracker]) -> None:
        self.queued = queued

    def start(self, report: Callable[[str], None], within: float = START_WITHIN) -> None:
        """Start them side by side, and wait for at most `within` seconds.

        Raises ConfigError for a tracker whose library is not there, or does not take what it is given.
        """
        until = time.monotonic() + within
        for queued in self.queued:
            queued.begin_to_start()
        try:
            for queued in self.queued:
                with waiting(f"starting {queued.tracker.name}", report):
                    queued.start(max(until - time.monotonic(), 0.0))
        except ConfigError:
            self.finish(exit_code=1)
            raise
        except KeyboardInterrupt:
            self.abandon()
            raise

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == FINDING:
            for queued in self.queued:
                queued.call(queued.tracker.alert, step, values)
        elif kind in GROUPS or kind == SAMPLE:
            for queued in self.queued:
                queued.write(kind, step, values)

    def rewind(self, step: int) -> None:
        for queued in self.queued:
            queued.call(queued.tracker.rewind, step)

    def update(self, config: Config) -> None:
        """Show the configuration as the tokenizer has settled it."""
        for queued in self.queued:
            queued.call(queued.tracker.update, config)

    def problems(self) -> list[tuple[str, str]]:
        """Each failure that the run should report, once: the tracker's key and a sentence."""
        return [(queued.tracker.key, text) for queued in self.queued for text in queued.problems()]

    def finish(self, exit_code: int) -> None:
        """Wait for the trackers to take what is left, side by side, and say on standard error what they did not."""
        for queued in self.queued:
            queued.begin_to_finish(exit_code)
        try:
            for queued in self.queued:
                with waiting(f"sending the last rows to {queued.tracker.name}", warn):
                    queued.finish()
        except KeyboardInterrupt:
            self.abandon()
            raise
        for _, text in self.problems():
            warn(text)

    def abandon(self) -> None:
        """Leave those that have not finished as they are, so that this process can end."""
        for queued in self.queued:
            queued.abandon()

    def shown(self) -> list[tuple[str, str]]:
        """Name of each tracker, and where the run is to be seen."""
        return [(queued.tracker.name, queued.tracker.where or "not started yet") for queued in self.queued]


def asked_for(run_dir: Path, config: Config) -> list[Tracker]:
    """The trackers that the configuration asks for, not started."""
    asked: list[Tracker] = []
    if config.wandb.mode != "off":
        asked.append(WandbTracker(run_dir, config))
    if config.trackers.tensorboard:
        asked.append(TensorBoardTracker(run_dir))
    if config.trackers.trackio:
        asked.append(TrackioTracker(run_dir, config))
    return asked


def open_trackers(run_dir: Path, config: Config, report: Callable[[str], None]) -> Trackers | None:
    """The trackers of a run's directory, started; None if the configuration asks for none. Raises ConfigError."""
    asked = asked_for(run_dir, config)
    if not asked:
        return None
    trackers = Trackers([QueuedTracker(tracker) for tracker in asked])
    trackers.start(report)
    return trackers
