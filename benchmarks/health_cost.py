"""What the numbers that tell a run's health cost of a step: norms, updates and routers' scores, in turns without them.

usage: python benchmarks/health_cost.py [SHAPE …] [--device cuda] [--rounds N]

Trains two engines on the same random tokens, a block of steps of each in turn. One finds the numbers as a run does:
some in every step, the others in every tenth. The other one's step is what remains without them. A step has one
micro-batch, so the cost is the greatest that it can be. What the host does with the numbers is timed alone.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from p828.bench.batches import random_batches
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.config import Config
from p828.data.batch import Batch
from p828.engine import microbatch
from p828.engine.interface import StepResult, StepStats
from p828.engine.plain import PlainEngine
from p828.model import transformer
from p828.model.router import Routing
from p828.optim.balance import update_biases
from p828.optim.clipping import global_norm, gradient_norms
from p828.runs.records import MEASURED_EVERY, encoded, shortened

WARM_UP = 12  # steps: compiled, captured, and with one that is measured


class BareEngine(PlainEngine):
    """The engine without the numbers."""

    def step(self, learning_rate: float, is_measured: bool = False) -> StepResult:
        totals = self.gradients.totals
        norm = global_norm(gradient_norms(self.gradients.sums.values()))
        applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
        self.optimizer.update(learning_rate, norm, applied)
        update_biases(self.model, totals["loads_LE"], self.config.balance.update_rate, applied)
        stats = StepStats({**totals, "grad_norm": norm})
        self.gradients.begin_step()
        return stats.fetch()


@contextmanager
def without_numbers() -> Iterator[None]:
    """Around the building of an engine, and the steps in which its layers are compiled and captured."""
    totals = microbatch.micro_batch_totals

    def bare(*arguments: object) -> dict[str, torch.Tensor]:
        return {name: total for name, total in totals(*arguments).items() if name != "entropy_L"}

    def no_entropy(routing: Routing, valid_T: torch.Tensor | None) -> torch.Tensor:
        return routing.scores_TE.new_zeros(())

    with (
        mock.patch.object(microbatch, "micro_batch_totals", bare),
        mock.patch.object(transformer, "score_entropy", no_entropy),
    ):
        yield


class Turns:
    """An engine and its steps."""

    def __init__(self, config: Config, kind: type[PlainEngine]) -> None:
        self.engine, self.config, self.count = kind(config), config, 0
        self.batches: Iterator[Batch] = rotate(random_batches(config, self.engine.device))
        self.run(WARM_UP)

    def run(self, steps: int) -> list[tuple[float, bool]]:
        """Seconds of each step, and whether it was measured; the host waits for the device in each."""
        found = []
        for _ in range(steps):
            self.count += 1
            started, measured = time.perf_counter(), self.count % MEASURED_EVERY == 0
            batch = next(self.batches)
            self.engine.forward_backward(batch, batch.num_targets)
            self.result = self.engine.step(self.config.optimizer.learning_rate, measured)
            found.append((time.perf_counter() - started, measured))
        return found


def compare(shape: str, device: str, rounds: int) -> None:
    """Print the row of a shape."""
    config = load_shape(shape, device, 0, 1)
    with without_numbers():
        bare = Turns(config, BareEngine)
    whole = Turns(config, PlainEngine)
    without, with_them, differences = [], list[tuple[float, bool]](), []
    for _ in range(rounds):
        block = bare.run(MEASURED_EVERY)
        without += [seconds for seconds, _ in block]
        found = whole.run(MEASURED_EVERY)
        with_them += found
        differences.append(statistics.fmean(s for s, _ in found) - statistics.fmean(s for s, _ in block))
    base, cost = statistics.median(without), statistics.median(differences)
    measured = statistics.median(seconds for seconds, is_one in with_them if is_one)
    others = statistics.median(seconds for seconds, is_one in with_them if not is_one)
    host = microseconds(lambda: json.dumps(encoded({k: shortened(n) for k, n in whole.result.further.items()})))
    print(
        f"{shape} on {whole.engine.device}: {base * 1e3:.3f} ms a step without; with them {others * 1e3:.3f} ms, and "
        f"{measured * 1e3:.3f} ms in every {MEASURED_EVERY}th: {cost * 1e6:+.0f} µs in the mean, {cost / base:+.2%}; "
        f"their part of a record takes the host {host:.0f} µs",
        flush=True,
    )


def microseconds(work: Callable[[], object], times: int = 200) -> float:
    """Of a call, in the mean."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["60m", "800m"], metavar="SHAPE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {MEASURED_EVERY} steps of each engine")
    given = parser.parse_args()
    for shape in given.shapes:
        compare(shape, given.device, given.rounds)
        if given.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
