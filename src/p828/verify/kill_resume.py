"""Proving that a run which is killed and resumed is the run that was not."""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import tomli_w

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import RunStopped
from p828.runs import records as metrics
from p828.runs.compare import distance_of_losses, first_difference
from p828.runs.layout import CHECKPOINTS, RECORDS_FILE

STEPS, CHECKPOINTS_IN_ALL, EVALUATIONS = 60, 12, 3
LOOK_EVERY = 0.005  # seconds
LEAST_KILLS = 2
SAVING_SHARE = 3  # every so many kills is meant for a moment in which a checkpoint is written
LAST_LINES = 8
TELL_EVERY = 10.0  # seconds
SEEDS = 1_000_000


def shortened(config: Config, directory: Path) -> Config:
    """The run with at most `STEPS` steps and checkpoints every few of them; on a GPU, only what repeats bit for bit.

    It ends by steps alone: two runs do not make the same steps in an hour.
    """
    steps = min(config.train.steps, STEPS)
    return dataclasses.replace(
        config,
        runs_dir=str(directory),
        train=dataclasses.replace(config.train, steps=steps, tokens=0.0, hours=0.0, deterministic=True),
        evaluation=dataclasses.replace(config.evaluation, every=max(steps // EVALUATIONS, 1), bigram_baseline=False),
        checkpoint=dataclasses.replace(config.checkpoint, every=max(steps // CHECKPOINTS_IN_ALL, 1)),
        wandb=dataclasses.replace(config.wandb, mode="off"),
    )


class KillResumeCheck:
    """A run trained at once, and the same one through `kills`, in `directory`.

    With `ranks` above 0 they run under a launcher with so many processes, and the killed one is resumed on each of
    `ranks_after` in turn. `seed` draws the steps of the kills and how long after them they come.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        kills: int,
        ranks: int = 0,
        ranks_after: Sequence[int] = (),
        tell: Callable[[str], None] = print,
        seed: int | None = None,
    ) -> None:
        self.config, self.directory, self.kills, self.tell = config, directory, kills, tell
        self.ranks, self.ranks_after = ranks, list(ranks_after) or [ranks]
        self.killed = self.kills_while_saving = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
        self._draw = random.Random(self.seed)

    def run(self) -> None:
        """Train both. Raises RunStopped, with what was said, if one fails by itself."""
        last = self.config.train.steps
        self.tell(f"the kills are drawn with --seed {self.seed}; runs are in {self.directory}")
        self.tell(f"training {last} steps at once")
        started = time.perf_counter()
        self._finish(self._start("whole", self.ranks), "whole")
        self.tell(f"trained {last} steps at once in {time.perf_counter() - started:.1f} s")
        for number, until, after in self._moments():
            ranks = self.ranks if number == 0 else self.ranks_after[(number - 1) % len(self.ranks_after)]
            is_for_saving = number % SAVING_SHARE == SAVING_SHARE - 1
            what = "while a checkpoint is written after" if is_for_saving else "after"
            self.tell(f"training from step {self._step()} on, to be killed {what} step {until}")
            if not self._kill(ranks, until, after, is_for_saving):
                self.tell(f"kill {number + 1} of {self.kills}: the run had come to its end")
                continue
            while_saving = any((self.directory / "killed" / CHECKPOINTS).glob(".step_*.tmp"))
            self.killed += 1
            self.kills_while_saving += while_saving
            what = ", while a checkpoint was written" if while_saving else ""
            self.tell(f"kill {number + 1} of {self.kills}: at step {self._step()} of {last}{what}")
        if self.killed < LEAST_KILLS:
            raise RunStopped(
                f"{self.killed} kills met the run before its end, which proves nothing: give more train.steps"
            )
        self.tell("resumed, to its end")
        self._finish(self._start("killed", self.ranks_after[(self.kills - 1) % len(self.ranks_after)]), "killed")
        self.tell("comparing the two")

    def _moments(self) -> list[tuple[int, int, float]]:
        """Number, step and seconds after it of every kill: what the seed decides."""
        last, moments = self.config.train.steps, []
        for number in range(self.kills):
            first = last * number // self.kills
            end = min(last * (number + 1) // self.kills, last - last // 8)  # before the end of the run
            until = self._draw.randrange(first, max(end, first + 1))
            moments.append((number, until, self._draw.random() * 0.05))
        return moments

    def difference(self) -> str | None:
        """In words, the first thing in which the two differ by a bit; None if they are the same."""
        return first_difference(self.directory / "whole", self.directory / "killed")

    def distance(self) -> tuple[float, str | None]:
        """`distance_of_losses` of the two."""
        return distance_of_losses(self.directory / "whole", self.directory / "killed")

    def _start(self, name: str, ranks: int) -> subprocess.Popen[bytes]:
        accumulation = self.config.train.gradient_accumulation
        if ranks:
            accumulation = accumulation * max(self.ranks, 1) // ranks
        train = dataclasses.replace(self.config.train, gradient_accumulation=accumulation)
        path = self.directory / f"{name}.toml"
        path.write_text(tomli_w.dumps(to_dict(dataclasses.replace(self.config, name=name, train=train))))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
        with (self.directory / "said.txt").open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "p828", "train", str(path)],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip
        return self.process

    def end(self) -> None:
        """Kill what is still at work, when the proof is broken off."""
        if self.process is not None and self.process.poll() is None:
            _kill_all(self.process)
            self.process.wait()

    def _finish(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Wait for a run's end, telling now and then how far it is. Raises RunStopped if it fails."""
        while process.poll() is None:
            try:
                process.wait(TELL_EVERY)
            except subprocess.TimeoutExpired:
                self.tell(f"  at step {self._step(name)} of {self.config.train.steps}")
        if process.returncode:
            said = (self.directory / "said.txt").read_text(errors="replace").splitlines()
            raise RunStopped("a run of the proof ended by itself:\n" + "\n".join(said[-LAST_LINES:]))

    def _kill(self, ranks: int, until: int, after: float, is_for_saving: bool) -> bool:
        """Go on with the run, and `kill -9` it `after` seconds behind a step, or while it writes its next checkpoint.

        Whether it was killed before its end. Raises RunStopped if it failed by itself.
        """
        records, checkpoints = self._records(), self.directory / "killed" / CHECKPOINTS
        before = records.stat().st_ino if records.exists() else None
        process = self._start("killed", ranks)
        # A process that is at work has put a file of its own in the place of the records, and removed what was left.
        while process.poll() is None and not (records.exists() and records.stat().st_ino != before):
            time.sleep(LOOK_EVERY)
        while process.poll() is None and self._step() < until:
            time.sleep(LOOK_EVERY)
        if is_for_saving:
            while process.poll() is None and not any(checkpoints.glob(".step_*.tmp/*")):
                time.sleep(LOOK_EVERY / 5)
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
        """The last one in a run's records."""
        if not self._records(name).exists():
            return 0
        return max((line["step"] for line in metrics.read(self._records(name)) if line["kind"] == "step"), default=0)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """The launcher, if it is one, and what it has started."""
    launcher = psutil.Process(process.pid)
    for each in (*launcher.children(recursive=True), launcher):
        with suppress(psutil.NoSuchProcess):
            each.kill()
