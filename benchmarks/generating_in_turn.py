"""A step of p828's decoder beside one of transformers' `generate`, on a CPU that others use too.

    python benchmarks/generating_in_turn.py quickstart 60m --batch 1 4 16

The two take turns in one process, a few steps each, and the fastest of these windows counts: what no other program
disturbed. Between them PyTorch sums as many numbers as a step must read once, which bounds what a step can reach.
`p828 bench generate` gives each system a process of its own, and the median.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from peers.transformers_generate import TransformersGenerator

from p828.bench.generate import same_model
from p828.bench.generation.own import OwnGenerator
from p828.bench.generation.step_bytes import step_bytes
from p828.bench.generation.workload import Workload, random_prompts
from p828.bench.systems import System, load_shape

WINDOW, WINDOWS, TURNS = 8, 15, 4
PROMPT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="+", help="presets or .toml files")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    for shape, batch in itertools.product(given.shape, given.batch):
        own, peer, reading = fastest(shape, batch)
        print(
            f"{shape}, batch {batch}: p828 {own:.3f} ms, transformers {peer:.3f} ms, {peer / own:.2f} ×; "
            f"reading alone {reading:.3f} ms, at most {peer / reading:.2f} ×",
            flush=True,
        )


def fastest(shape: str, batch: int) -> tuple[float, float, float]:
    """Milliseconds a step of p828 and of transformers, and of reading what a step must read."""
    steps = WINDOW * WINDOWS
    config = Workload((batch,), PROMPT, steps).with_context(same_model(load_shape(shape, "cpu", 0, 0)))
    prompts = random_prompts(config.model.vocab_size, batch, PROMPT)
    own, peer = OwnGenerator(config), TransformersGenerator(System("transformers", "transformers", config))
    threads = torch.get_num_threads()
    needed = step_bytes(config.model, batch, PROMPT + steps / 2, itemsize=4)
    numbers = torch.ones(threads, int(needed) // 4 // threads)
    windows: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(TURNS):
        windows[2].extend(timed_windows(lambda: numbers.sum(dim=1)))
        with own.begun(prompts, steps, is_sampled=False) as (decoder, _):
            windows[0].extend(timed_windows(decoder.step))
        times = peer.times(prompts, steps + 1)
        windows[1].extend((times[i + WINDOW] - times[i]) / WINDOW for i in range(0, steps, WINDOW))
    own_ms, peer_ms, reading_ms = (1e3 * min(seconds) for seconds in windows)
    return own_ms, peer_ms, reading_ms


def timed_windows(step: Callable[[], object]) -> list[float]:
    """Seconds a step, of each window."""
    found = []
    for _ in range(WINDOWS):
        started = time.perf_counter()
        for _ in range(WINDOW):
            step()
        found.append((time.perf_counter() - started) / WINDOW)
    return found


if __name__ == "__main__":
    main()
