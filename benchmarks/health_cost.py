"""What the numbers that tell a run's health cost of a step: norms, updates and routers' scores, in turns without them.

usage: python benchmarks/health_cost.py [SHAPE …] [--device cuda] [--rounds N]

Trains two engines on the same random tokens, a block of steps of each kind in turn: of one engine whose layers find
nothing, and whose step is what remains without the numbers; of another one whose layers find them, with that step, and
with a run's own: some numbers in every step, the others in every tenth. A step has one micro-batch, so the cost is as
great as it can be. What the host does with the numbers is timed alone. Two engines may be a few tenths of a percent
apart by where their tensors lie, which is in the forward pass's figure.
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
from p828.data.batch import PADDING, Batch
from p828.data.fingerprints import fingerprints
from p828.engine import microbatch
from p828.engine.interface import StepResult, StepStats
from p828.engine.plain import PlainEngine
from p828.model import transformer
from p828.model.router import Routing
from p828.optim.balance import update_biases
from p828.optim.clipping import global_norm, gradient_norms
from p828.runs.records import MEASURED_EVERY, encoded, shortened


def bare_step(engine: PlainEngine, learning_rate: float) -> StepResult:
    """`PlainEngine.step` without the numbers."""
    totals = engine.gradients.totals
    norm = global_norm(gradient_norms(engine.gradients.sums.values()))
    applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
    engine.optimizer.update(learning_rate, norm, applied)
    update_biases(engine.model, totals["loads_LE"], engine.config.balance.update_rate, applied)
    stats = StepStats({"loss": totals["loss"], "loads_LE": totals["loads_LE"], "grad_norm": norm})
    engine.gradients.begin_step()
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

    def __init__(self, config: Config, is_bare: bool) -> None:
        self.engine, self.rate, self.count = PlainEngine(config), config.optimizer.learning_rate, 0
        self.batches: Iterator[Batch] = rotate(random_batches(config, self.engine.device))
        self.block(is_bare=True)  # compiled and captured
        self.result = self.block(is_bare)[1]

    def block(self, is_bare: bool) -> tuple[list[float], StepResult]:
        """Seconds of MEASURED_EVERY steps, the last of which is measured; the host waits for the device in each."""
        seconds = []
        for number in range(1, MEASURED_EVERY + 1):
            started = time.perf_counter()
            batch = next(self.batches)
            self.engine.forward_backward(batch, batch.num_targets)
            if is_bare:
                result = bare_step(self.engine, self.rate)
            else:
                result = self.engine.step(self.rate, number == MEASURED_EVERY)
            seconds.append(time.perf_counter() - started)
        return seconds, result


def compare(shape: str, device: str, rounds: int) -> None:
    """Print the row of a shape."""
    config = load_shape(shape, device, 0, 1)
    with without_numbers():
        bare = Turns(config, is_bare=True)
    whole = Turns(config, is_bare=False)
    base, forward, update, measured = [], [], [], []
    for _ in range(rounds):
        blocks = bare.block(is_bare=True)[0], whole.block(is_bare=True)[0], whole.block(is_bare=False)[0]
        means = [statistics.fmean(block) for block in blocks]
        base.append(means[0])
        forward.append(means[1] - means[0])
        update.append(means[2] - means[1])
        measured.append(blocks[2][-1] - statistics.fmean(blocks[2][:-1]))
    milliseconds, *costs = (statistics.median(numbers) for numbers in (base, forward, update, measured))
    numbers = {name: shortened(found) for name, found in whole.result.further.items()}
    host = microseconds(lambda: json.dumps(encoded(numbers)))
    batch = next(whole.batches)
    tokens_BS, is_token_BS = batch.tokens_BS.numpy(), batch.document_ids_BS.numpy() != PADDING
    loader = microseconds(lambda: fingerprints(tokens_BS, is_token_BS))
    print(
        f"{shape} on {whole.engine.device}: {milliseconds * 1e3:.3f} ms a step without; in the mean forward pass "
        f"{costs[0] * 1e6:+.0f} µs, update {costs[1] * 1e6:+.0f} µs ({costs[2] * 1e6:.0f} more in every "
        f"{MEASURED_EVERY}th): {sum(costs[:2]) / milliseconds:+.2%}; a record's line takes the host {host:.0f} µs, "
        f"and a micro-batch's fingerprints the loader's thread {loader:.0f} µs",
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
    parser.add_argument("--rounds", type=int, default=12, help=f"of {MEASURED_EVERY} steps of each kind")
    given = parser.parse_args()
    for shape in given.shapes:
        compare(shape, given.device, given.rounds)
        if given.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
