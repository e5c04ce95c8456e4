"""How long training stands still for a checkpoint, and what the copy that it is written from takes.

usage: python benchmarks/saving.py [--shape 800m] [--device cuda] [--gradient-accumulation N] [--directory DIR]

Trains on random tokens, saves twice beside the training (the first save also makes the copy's tensors) and once with
the training waiting, as where there is no room for a copy.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from p828.bench.batches import random_batches
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.config import Config
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup
from p828.engine.plain import PlainEngine
from p828.train.checkpoint_writer import save
from p828.train.checkpointing import AsyncCheckpointer

STEPS_ALONE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="800m")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gradient-accumulation", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to save: its disk is what counts")
    given = parser.parse_args()
    config = load_shape(given.shape, given.device, 0, given.gradient_accumulation)
    engine = PlainEngine(config)
    batches = rotate(random_batches(config, engine.device))
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="p828-saving-") as place:
        step(config, engine, batches)
        alone = statistics.median(step(config, engine, batches) for _ in range(STEPS_ALONE))
        print(f"{config.name} on {engine.device}: {alone * 1e3:.1f} ms a step")
        saver = AsyncCheckpointer(Path(place), ProcessGroup(), engine.device)
        for number in (1, 2):
            since = time.monotonic()
            saver.start(number, engine.state_dict(), {}, since)
            beside = []
            while not saver.is_written:
                beside.append(step(config, engine, batches))
            saved = saver.finish()
            slower = f"{statistics.median(beside) / alone - 1:+.1%}" if beside else "none"
            print(
                f"save {number} beside the training: {saved.seconds:.2f} s, of which training waited "
                f"{saved.waited * 1e3:.1f} ms ({saved.waited / saved.seconds:.2%}); the copy takes "
                f"{saved.copy_bytes / 1e9:.2f} GB; {len(beside)} steps meanwhile, each {slower}"
            )
        started = time.monotonic()
        save(Path(place), 3, engine.state_dict(), {})
        print(f"save 3, training waiting: {time.monotonic() - started:.2f} s")


def step(config: Config, engine: PlainEngine, batches: Iterator[Batch]) -> float:
    """Seconds for one, in which the device still does the update of the one before, and not its own."""
    started = time.monotonic()
    own = [next(batches) for _ in range(config.train.gradient_accumulation)]
    targets = sum(batch.num_targets for batch in own)
    for batch in own:
        engine.forward_backward(batch, targets)
    engine.step(config.optimizer.learning_rate)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
