"""Checks that a run which is killed and resumed gives the same bits as one that was not."""

import dataclasses
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import tomli_w

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import RunFailed, warn
from p828.runs import records
from p828.runs.compare import distance_of_losses, first_difference
from p828.runs.file_names import CHECKPOINTS, RECORDS_FILE

STEPS, CHECKPOINTS_IN_ALL, EVALUATIONS = 60, 12, 3
POLL_EVERY = 0.005  # seconds
LEAST_KILLS = 2
KILLS_PER_SAVING = 3  # every third kill is meant for a moment in which a checkpoint is written
LAST_LINES = 8
OUTPUT_FILE = "output.txt"  # of the process started last
REPORT_EVERY = 10.0  # seconds
SEEDS = 1_000_000
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def shortened(config: Config, directory: Path) -> Config:
    """The run with at most `STEPS` steps and checkpoints every few of them; on a GPU, only what repeats bit for bit.

    It ends by steps alone: two runs do not make the same steps in an hour.
    """
    steps = min(config.train.steps, STEPS)
    every = max(steps // EVALUATIONS, 1)
    return dataclasses.replace(
        config,
        runs_dir=str(directory),
        train=dataclasses.replace(config.train, steps=steps, tokens=0.0, hours=0.0, deterministic=True),
        evaluation=dataclasses.replace(
            config.evaluation,
            every=every,
            tasks_every=every if config.evaluation.tasks else config.evaluation.tasks_every,
            bigram_baseline=False,
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=max(steps // CHECKPOINTS_IN_ALL, 1)),
        wandb=dataclasses.replace(config.wandb, mode="off"),
        trackers=dataclasses.replace(config.trackers, tensorboard=False, trackio=False),
    )


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt, so that clean-up runs.

    The exit code is the one that a shell gives to the signal. Later ones do not disturb the clean-up. A signal that is
    ignored, as under `nohup`, stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for each in ENDING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        warn(f"stopped by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class KillResumeCheck:
    """Trains the run `whole` without a break and the run `killed` through a number of kills, both in `directory`.

    With `ranks` above 0 a launcher starts that number of processes, and the killed run is resumed on each of
    `ranks_after` in turn. `seed` draws the step of each kill and the delay after it.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        kills: int,
        ranks: int = 0,
        ranks_after: Sequence[int] = (),
        report: Callable[[str], None] = print,
        seed: int | None = None,
    ) -> None:
        self.config, self.directory, self.kills, self.report = config, directory, kills, report
        self.ranks, self.ranks_after = ranks, list(ranks_after) or [ranks]
        self.killed = self.kills_while_saving = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
        self._draw = random.Random(self.seed)

    def run(self) -> None:
        """Train both. Raises RunFailed, with the last lines of its output, if one fails by itself.

        No process is left at work, whatever it raises.
        """
        try:
            self._train_both()
        finally:
            self._end()

    def _train_both(self) -> None:
        last = self.config.train.steps
        self.report(f"the kills are drawn with --seed {self.seed}; runs are in {self.directory}")
        self.report(f"training {last} steps at once")
        started = time.perf_counter()
        self._finish(self._start("whole", self.ranks), "whole")
        self.report(f"trained {last} steps at once in {time.perf_counter() - started:.1f} s")
        for number, until, after in self._moments():
            ranks = self.ranks if number == 0 else self.ranks_after[(number - 1) % len(self.ranks_after)]
            is_for_saving = number % KILLS_PER_SAVING == KILLS_PER_SAVING - 1
            what = "while a checkpoint is written after" if is_for_saving else "after"
            self.report(f"training from step {self._step()} on, to be killed {what} step {until}")
            if not self._kill(ranks, until, after, is_for_saving):
                self.report(f"kill {number + 1} of {self.kills}: the run had come to its end")
                continue
            while_saving = any((self.directory / "killed" / CHECKPOINTS).glob(".step_*.tmp"))
            self.killed += 1
            self.kills_while_saving += while_saving
            what = ", while a checkpoint was written" if while_saving else ""
            self.report(f"kill {number + 1} of {self.kills}: at step {self._step()} of {last}{what}")
        if self.killed < LEAST_KILLS:
            raise RunFailed(
                f"{self.killed} kills met the run before its end, which proves nothing: give more train.steps"
            )
        self.report("resumed, to its end")
        self._finish(self._start("killed", self.ranks_after[(self.kills - 1) % len(self.ranks_after)]), "killed")
        self.report("comparing the two")

    def _moments(self) -> list[tuple[int, int, float]]:
        """Number, step and delay in seconds of every kill: what the seed decides."""
        last, moments = self.config.train.steps, []
        for number in range(self.kills):
            first = last * number // self.kills
            end = min(last * (number + 1) // self.kills, last - last // 8)  # before the end of the run
            until = self._draw.randrange(first, max(end, first + 1))
            moments.append((number, until, self._draw.random() * 0.05))
        return moments

    def difference(self) -> str | None:
        """In words, the first difference of the two runs; None if they are the same, bit for bit."""
        return first_difference(self.directory / "whole", self.directory / "killed")

    def distance(self) -> tuple[float, str | None]:
        """The `distance_of_losses` of the two runs."""
        return distance_of_losses(self.directory / "whole", self.directory / "killed")

    def _start(self, name: str, ranks: int) -> subprocess.Popen[bytes]:
        accumulation = self.config.train.gradient_accumulation
        if ranks:
            accumulation = accumulation * max(self.ranks, 1) // ranks
        train = dataclasses.replace(self.config.train, gradient_accumulation=accumulation)
        path = self.directory / f"{name}.toml"
        path.write_text(tomli_w.dumps(to_dict(dataclasses.replace(self.config, name=name, train=train))))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
        with (self.directory / OUTPUT_FILE).open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "p828", "train", str(path)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        return self.process

    def _end(self) -> None:
        """Kill the processes of a run that is still at work."""
        if self.process is not None and self.process.poll() is None:
            _kill_all(self.process)
            self.process.wait()

    def _finish(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Wait for a run's end, and report its step every ten seconds. Raises RunFailed if it fails."""
        while process.poll() is None:
            try:
                process.wait(REPORT_EVERY)
            except subprocess.TimeoutExpired:
                self.report(f"  at step {self._step(name)} of {self.config.train.steps}")
        if process.returncode:
            lines = (self.directory / OUTPUT_FILE).read_text(errors="replace").splitlines()
            raise RunFailed("a run of the proof ended by itself:\n" + "\n".join(lines[-LAST_LINES:]))

    def _kill(self, ranks: int, until: int, after: float, is_for_saving: bool) -> bool:
        """Resume the run, and `kill -9` it `after` seconds after step `until`, or while it writes its next checkpoint.

        Returns whether it was killed before its end. Raises RunFailed if it failed by itself.
        """
        path, checkpoints = self._records(), self.directory / "killed" / CHECKPOINTS
        before = path.stat().st_ino if path.exists() else None
        process = self._start("killed", ranks)
        # A process that is at work has replaced the records file, and removed what the one before it left.
        while process.poll() is None and not (path.exists() and path.stat().st_ino != before):
            time.sleep(POLL_EVERY)
        while process.poll() is None and self._step() < until:
            time.sleep(POLL_EVERY)
        if is_for_saving:
            while process.poll() is None and not any(checkpoints.glob(".step_*.tmp/*")):
                time.sleep(POLL_EVERY / 5)
        else:
            time.sleep(after)
        if process.poll() is None:
            _kill_all(process)
        if process.wait() == -signal.SIGKILL:
            return True
        self._finish(process, "killed")
        return False

    def _records(self, name: str = "killed") -> Path:
        return self.directory / name / RECORDS_FILE

    def _step(self, name: str = "killed") -> int:
        """The last step in a run's records."""
        if not self._records(name).exists():
            return 0
        return max((line["step"] for line in records.read(self._records(name)) if line["kind"] == "step"), default=0)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its descendants: it may be a launcher."""
    launcher = psutil.Process(process.pid)
    for each in (*launcher.children(recursive=True), launcher):
        with suppress(psutil.NoSuchProcess):
            each.kill()
