"""What a tracker's thread takes of a processor for a step: for the names of its numbers, and for the library's call.

usage: python benchmarks/tracker_cost.py [--layers N] [--rows N]

Processor time, on this machine, of records as long as those of a model of so many layers. W&B records offline; what
its own process and a network take is not in it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p828.config import from_dict
from p828.optim.parts import PARTS
from p828.train.log.panels import OVER_LAYERS, panels
from p828.train.log.tensorboard import TensorBoardTracker
from p828.train.log.trackio import TrackioTracker
from p828.train.log.wandb import WandbTracker

BY_PART = ("grad_norms", "weight_norms", "update_ratios", "changed")
SCALARS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=300)
    arguments = parser.parse_args()
    values: dict[str, Any] = {f"number_{index}": 0.5 for index in range(SCALARS)}
    values |= {key: [0.5] * arguments.layers for key in (*OVER_LAYERS, "sink_mean")}
    values |= {key: dict.fromkeys(PARTS, 0.5) for key in BY_PART}
    numbers = panels("step", values)
    print(f"{len(numbers)} numbers a step, {arguments.layers} layers")
    took = milliseconds(lambda step: panels("step", values), arguments.rows)
    print(f"{'names':12} {took:.3f} ms a step", flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["TRACKIO_DIR"] = str(directory / "trackio")  # before trackio is imported
        config = from_dict({"name": "cost", "wandb": {"mode": "offline"}, "trackers": {"trackio": True}}, "cost")
        trackers = TensorBoardTracker(directory), TrackioTracker(directory, config), WandbTracker(directory, config)
        for tracker in trackers:
            tracker.start()
            tracker.write(0, numbers)
            took = milliseconds(lambda step, write=tracker.write: write(step, numbers), arguments.rows)
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
