"""What the watch over a run's health costs of a step: its numbers, its rules and its probes, and their sum.

usage: python benchmarks/health_cost.py [SHAPE …] [--device cuda] [--rounds N]

Trains two engines on the same random tokens, a block of steps of each kind in turn: of one engine whose layers find
nothing, and whose step is what remains without the numbers; of another one whose layers find them, with that step, and
with a run's own: some numbers in every step, the others in every tenth. A step has one micro-batch, so the cost is as
great as it can be; what it is of the shape's own step, with all its micro-batches, follows from that. What the host
does with the numbers is timed alone. Two engines may be a few tenths of a percent apart by where their tensors lie,
which is in the forward pass's figure.

The rules follow the records of the second engine's steps as in a run, at the same cadence and with a full window, in
turns with blocks of steps that are recorded without them. The probes are made a few times as after an evaluation, and
their time is spread over the steps from one evaluation of the shape to the next. In a run they are left out where they
would take more than a thousandth of its time, after the first ones.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from p828.bench.batches import random_batches
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.config import Config
from p828.data.batch import PADDING, Batch
from p828.data.fingerprints import fingerprints
from p828.distributed.group import ProcessGroup
from p828.engine import microbatch
from p828.engine.interface import StepResult, StepStats
from p828.engine.plain import PlainEngine
from p828.health.facts import Facts
from p828.health.window import RECENT
from p828.model import transformer
from p828.model.router import Routing
from p828.optim.balance import update_biases
from p828.optim.clipping import global_norm, gradient_norms
from p828.runs.records import MEASURED_EVERY, Recorder, encoded, read, shortened
from p828.runs.train_state import BatchStats, TrainState
from p828.train.health import HealthWatch
from p828.train.log.console import Console
from p828.train.log.log import Log
from p828.train.log.usage import Usage
from p828.train.probes import SHARE, Probes

RULE_BLOCKS = 5  # of steps with the rules and without them, for every block of the others: a look comes now and then
PROBED = 3  # times


def bare_step(engine: PlainEngine, learning_rate: float) -> StepResult:
    """`PlainEngine.step` without the numbers."""
    totals = engine.gradients.totals
    norm = global_norm(gradient_norms(engine.gradients.sums.values()))
    applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
    update_biases(engine.model, totals["loads_LE"], engine.config.balance.update_rate, applied)
    stats = StepStats({"loss": totals["loss"], "loads_LE": totals["loads_LE"], "grad_norm": norm})
    engine.optimizer.update(learning_rate, norm, applied)
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
        """Seconds of MEASURED_EVERY steps, the last of which is measured. Each has the update of the one before."""
        seconds = []
        for number in range(1, MEASURED_EVERY + 1):
            started = time.perf_counter()
            batch = next(self.batches)
            self.engine.forward_backward(batch, batch.num_targets)
            if is_bare:
                result = bare_step(self.engine, self.rate)
            else:
                result = self.engine.step(self.rate, number == MEASURED_EVERY)
            if number == MEASURED_EVERY and self.engine.device.type == "cuda":
                torch.cuda.synchronize()  # a block leaves nothing to the next one
            seconds.append(time.perf_counter() - started)
        return seconds, result


class Watched:
    """The engine's steps as a run records them, with the rules and the probes of a run."""

    def __init__(self, config: Config, turns: Turns, directory: Path) -> None:
        self.turns, self.state = turns, TrainState()
        self.recorder = Recorder(directory)
        console = Console(directory, config.train.steps, is_quiet=True)
        device = turns.engine.device
        self.log = Log(self.recorder, console, Usage(), config.model, config.data, config.train, device)
        self.batch = next(turns.batches)
        self.probes = Probes(config, [self.batch], turns.engine, self.log, ProcessGroup())
        sources = config.data.source_names
        # `health.on_critical` is "continue": neither a rollback nor a tokenizer is asked for.
        self.watch = HealthWatch(config.health, Facts.of(config), self.log, None, sources, None)  # type: ignore[arg-type]
        self.block(is_watched=False)
        self.watch.begin()
        self.fill()

    def fill(self) -> None:
        """Give the rules as many steps as they ever look at."""
        records = [record for record in read(self.recorder.path) if record["kind"] == "step"]
        while self.state.step < RECENT + MEASURED_EVERY:
            record = records[self.state.step % len(records)]
            self.state.step += 1
            self.watch.add({**record, "step": self.state.step, "rows": f"{self.state.step:08x}"})

    def block(self, is_watched: bool) -> float:
        """Seconds of a step, the mean of MEASURED_EVERY."""
        self.recorder.follower = self.watch if is_watched else None
        begun = time.perf_counter()
        for _ in range(MEASURED_EVERY):
            batch, started = next(self.turns.batches), time.perf_counter()
            stats = BatchStats.of([batch], len(self.log.data.source_names))
            self.turns.engine.forward_backward(batch, batch.num_targets)
            if is_watched:
                self.probes.note([batch])
                self.watch.look()
            result = self.turns.engine.step(self.turns.rate, self.log.is_measured(self.state.step + 1))
            self.state.count(stats)
            self.state.step += 1
            seconds = time.perf_counter() - started
            self.log.step(self.state, result, stats, self.turns.rate, seconds, is_evaluated=False)
            if is_watched:
                self.watch.after_step(self.state, [batch])
        return (time.perf_counter() - begun) / MEASURED_EVERY

    def rules_seconds(self, rounds: int) -> float:
        """What following, looking and telling add to a step, in the mean."""
        pairs = [(self.block(is_watched=False), self.block(is_watched=True)) for _ in range(rounds)]
        return statistics.fmean(watched - bare for bare, watched in pairs)

    def probes_seconds(self) -> float:
        """Of all probes after an evaluation, the median; the first time, which compiles, does not count."""
        found = []
        for number in range(PROBED + 1):
            started = time.perf_counter()
            self.probes.run(self.state.step + number)
            found.append(time.perf_counter() - started)
        return statistics.median(found[1:])


def compare(shape: str, device: str, rounds: int) -> None:
    """Print the rows of a shape."""
    config, micro_batches = load_shape(shape, device, 0, 1), load_shape(shape, device, 0, 0).train.gradient_accumulation
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
    seconds, *costs = (statistics.median(numbers) for numbers in (base, forward, update, measured))
    numbers = {name: shortened(found) for name, found in whole.result.further.items()}
    host = microseconds(lambda: json.dumps(encoded(numbers)))
    of_numbers = sum(costs[:2]) / seconds
    batch = next(whole.batches)
    tokens_BS, is_token_BS = batch.tokens_BS.numpy(), batch.document_ids_BS.numpy() != PADDING
    loader = microseconds(lambda: fingerprints(tokens_BS, is_token_BS))
    print(
        f"{shape} on {whole.engine.device}: {seconds * 1e3:.3f} ms a step without; in the mean forward pass "
        f"{costs[0] * 1e6:+.0f} µs, update {costs[1] * 1e6:+.0f} µs ({costs[2] * 1e6:.0f} more in every "
        f"{MEASURED_EVERY}th): {of_numbers:+.2%}; a record's line takes the host {host:.0f} µs, "
        f"and a micro-batch's fingerprints the loader's thread {loader:.0f} µs",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        watched = Watched(config, whole, Path(directory))
        rules, probes = watched.rules_seconds(RULE_BLOCKS * rounds), watched.probes_seconds()
        watched.recorder.close()
    shares = of_numbers, host / 1e6 / seconds, rules / seconds, min(probes / every(config) / seconds, SHARE)
    print(
        f"{shape}: rules {rules * 1e6:+.0f} µs a step; probes {probes * 1e3:.0f} ms at every evaluation, which comes "
        f"every {every(config)} steps\n{shape}: numbers {shares[0]:+.2%}, their line {shares[1]:+.2%}, rules "
        f"{shares[2]:+.2%}, probes {shares[3]:+.2%}: in all {sum(shares):+.2%} of a step",
        flush=True,
    )
    own = (costs[0] * micro_batches + costs[1] + host / 1e6) / (seconds * micro_batches)
    print(f"{shape}: numbers and their line {own:+.2%} of a step of its {micro_batches} micro-batches", flush=True)


def every(config: Config) -> int:
    """Steps from one evaluation to the next."""
    return config.evaluation.every or config.train.steps


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
