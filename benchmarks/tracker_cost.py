"""What trackers cost a run: the time of its steps with and without each, and the processor time of their threads.

usage: python benchmarks/tracker_cost.py [--device cpu] [--steps N] [--rounds N] [--layers N] [--rows N]

Trains the quickstart's model in turns without trackers, with each, and with all, in one process. A step lasts from one
record to the next, so that all the run does is in it; of a run the median counts, and of the rounds the median. Beside
it, the processor time of the run's own thread and of all threads, which others at work on the machine change less. Then
a tracker's thread is measured alone, at records as long as those of a model of so many layers. W&B records offline;
what its own process and a network take is not in it.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from p828.api import load_config, train_run
from p828.config import from_dict
from p828.engine.interface import BY_PART
from p828.optim.parts import PARTS
from p828.runs.records import Recorder
from p828.train.log.panels import OVER_LAYERS, panels
from p828.train.log.tensorboard import TensorBoardTracker
from p828.train.log.trackio import TrackioTracker
from p828.train.log.wandb import WandbTracker

SCALARS = 25
WARM_UP = 20  # steps
ASKED: dict[str, dict[str, Any]] = {
    "none": {},
    "tensorboard": {"trackers.tensorboard": True},
    "trackio": {"trackers.trackio": True},
    "wandb": {"wandb.mode": "offline"},
}
CLOCKS = {"wall": time.perf_counter, "run's thread": time.thread_time, "all threads": time.process_time}
ASKED["all"] = ASKED["tensorboard"] | ASKED["trackio"] | ASKED["wandb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--steps", type=int, default=200, help=f"of each run, over {WARM_UP}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=300)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRACKIO_DIR"] = f"{name}/trackio"  # before trackio is imported
        compare_runs(Path(name), given.device, given.steps, given.rounds)
        time_threads(Path(name), given.layers, given.rows)


def compare_runs(directory: Path, device: str, steps: int, rounds: int) -> None:
    """Print a row for each: the milliseconds of a step in the medians of the rounds, and what is more than without."""
    found: dict[str, list[tuple[float, ...]]] = {asked: [] for asked in ASKED}
    a_step(directory, "warm-up", device, WARM_UP + 1, {})
    for number in range(rounds):
        for asked in list(ASKED)[:: 1 if number % 2 else -1]:
            found[asked].append(a_step(directory, f"{asked}{number}", device, steps, ASKED[asked]))
    print(f"quickstart on {device}, ms a step: {', '.join(CLOCKS)}")
    for asked, rows in found.items():
        shown = []
        for own, beside in zip(zip(*rows, strict=True), zip(*found["none"], strict=True), strict=True):
            more = statistics.median(one / other - 1 for one, other in zip(own, beside, strict=True))
            shown.append(f"{statistics.median(own) * 1e3:8.2f} {more:+.1%}")
        print(f"{asked:12} {'  '.join(shown)}", flush=True)


def a_step(directory: Path, name: str, device: str, steps: int, asked: dict[str, Any]) -> tuple[float, ...]:
    """Seconds of a run's step by each of CLOCKS. All runs have the tokenizer of the first one."""
    tokenizer = directory / "warm-up" / "tokenizer.json"
    values = {"name": name, "runs_dir": str(directory), "train.device": device, "train.steps": steps}
    values |= {"evaluation.every": 0, "evaluation.prompts": [], "evaluation.bigram_baseline": False}
    values |= {"checkpoint.every": steps, "schedule.warmup_steps": WARM_UP}
    values |= {"tokenizer.name": str(tokenizer)} if tokenizer.exists() else {"tokenizer.training_megabytes": 1}
    times: list[list[float]] = []
    write = Recorder.write

    def timed(recorder: Recorder, kind: str, step: int, **numbers: Any) -> None:
        write(recorder, kind, step, **numbers)
        if kind == "step" and step >= WARM_UP:
            times.append([clock() for clock in CLOCKS.values()])

    with mock.patch.object(Recorder, "write", timed), contextlib.redirect_stdout(io.StringIO()):
        train_run(load_config("quickstart", values | asked))
    passed = ([after - before for before, after in pairwise(clock)] for clock in zip(*times, strict=True))
    return tuple(statistics.median(seconds) for seconds in passed)


def time_threads(directory: Path, layers: int, rows: int) -> None:
    """Print the processor time of a step's row, for the names of its numbers and for each library's call."""
    values: dict[str, Any] = {f"number_{index}": 0.5 for index in range(SCALARS)}
    values |= {key: [0.5] * layers for key in (*OVER_LAYERS, "sink_mean")}
    values |= {key: dict.fromkeys(PARTS, 0.5) for key in BY_PART}
    numbers = panels("step", values)
    print(f"{len(numbers)} numbers a step, {layers} layers: processor time in the tracker's thread")
    print(f"{'names':12} {milliseconds(lambda step: panels('step', values), rows):.3f} ms a step", flush=True)
    config = from_dict({"name": "cost", "wandb": {"mode": "offline"}, "trackers": {"trackio": True}}, "cost")
    for tracker in TensorBoardTracker(directory), TrackioTracker(directory, config), WandbTracker(directory, config):
        tracker.start()
        tracker.write(0, numbers, {})
        took = milliseconds(lambda step, write=tracker.write: write(step, numbers, {}), rows)
        print(f"{tracker.key:12} {took:.3f} ms a step", flush=True)
        tracker.finish(0)


def milliseconds(work: Callable[[int], Any], rows: int) -> float:
    """Processor time of this thread for one row."""
    started = time.thread_time()
    for step in range(1, rows + 1):
        work(step)
    return (time.thread_time() - started) / rows * 1e3


if __name__ == "__main__":
    main()
