"""Time a training step on several GPUs of this machine at each ZeRO stage, beside one GPU of the plain engine.

usage: python benchmarks/scaling.py [--shape 800m] [--gpus 1 2 4] [--systems plain sharded-1 deepspeed-1] [--steps 10]
           [--gradient-accumulation N] [--micro-batch-size N] [--device cuda] [--check 60m] [--json FILE]

A system is `plain`, an engine and a ZeRO stage, as `sharded-3`, or torchtitan's FSDP2 at what corresponds to the stage,
`torchtitan-2` or `torchtitan-3` (`pip install 'p828[peers]'`). `plain` runs on one GPU, and then on as many as the
others, at the same time and each by itself, since GPUs of one kind differ: that row's rate is the sum of theirs, and
the file has `own_seconds` of each. `--gpus` is all GPUs unless given. A row that fails says why, and the others go on.
`--json` is written anew after each row; `scaling_figure.py` draws such files.

A row has: tokens a second, efficiency against the first GPU of the plain engine, against the mean of the GPUs' own
rates with it, and against one GPU of the same system, memory, bytes that a rank passes to collective operations in a
step, and of the step's time the communication and its part that nothing else covers. MFU is a share of the GPU's
datasheet, the next column of a large matrix product measured on it, as `p828 bench train` gives MFU; both count matrix
products and attention within documents. `torchtitan's MFU` is of the datasheet, too, and counts as torchtitan and
others do: attention of every token to its whole row, 6 N + 12 L H D S a token (PaLM, arXiv 2204.02311, appendix B).
With `--check` a shape is also trained on text at each stage, on one GPU and on all of them, there with a rank killed on
the way and the rest on half as many; the losses are compared.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import tomli_w
import torch

from p828.bench.batches import attended_pairs, random_batches
from p828.bench.collectives import counted, occupation
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.config import Config, from_dict, validate
from p828.config.values import to_dict
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup, joined
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.plain import PlainEngine
from p828.engine.sharded.engine import ShardedEngine
from p828.files import write_atomic
from p828.model.costs import count_parameters, training_flops
from p828.runs import file_names
from p828.runs import records as metrics
from p828.system.device import peak_memory, pick_device
from p828.system.gpus import peak_flops
from p828.system.timing import matmul_flops, step_seconds

WARM_UP = 3
ROW_SECONDS = 240
SYSTEMS = ["plain", "sharded-1", "sharded-2", "sharded-3"]
COLUMNS = (
    "system", "GPUs", "ms a step", "tokens/s", "of plain", "of their own", "of itself on one", "MFU", "of a product",
    "torchtitan's MFU", "memory, GB", "passed, GB", "communication, ms", "exposed, ms",
)  # fmt: skip
CHECKED_STEPS, KILLED_AFTER = 12, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="800m")
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--steps", type=int, default=10, help="0: only what --check does")
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--gradient-accumulation", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", metavar="SHAPE", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker.read_text()), given.worker.with_suffix(".result"))
        return
    config = load_shape(given.shape, given.device, given.micro_batch_size, given.gradient_accumulation)
    there = torch.cuda.device_count() if given.device == "cuda" else max(given.gpus or [2])
    gpus = given.gpus or [there]
    if not 1 <= min(gpus) <= max(gpus) <= there:
        parser.error(f"--gpus {' '.join(map(str, gpus))}: {there} are there")
    for system in given.systems:
        validate(with_engine(config, system))
    results: list[dict[str, Any]] = []
    for system in given.systems:
        for count in sorted({1, *gpus}) if system == "plain" else gpus:
            if not given.steps:
                continue
            started = time.perf_counter()
            try:
                results.append(measure(config, system, count, given.steps))
            except Failed as error:
                print(f"{system} on {count} failed:\n{error}", flush=True)
                continue
            if given.json:
                write_atomic(given.json, json.dumps(results, indent=1))
            if len(results) == 1:
                print(heading(config, results[0]["device"]))
            print(row(config, results), flush=True)
            print(f"{system} on {count}: {time.perf_counter() - started:.0f} s in all", file=sys.stderr, flush=True)
    if given.check:
        shape = load_shape(given.check, given.device, given.micro_batch_size, 0)
        for system in given.systems:
            if system.startswith(("sharded", "deepspeed")):
                print(check(shape, system, max(gpus)))


class Failed(Exception):
    """A row's processes ended with an error, or not in time; the end of what they said."""


def with_engine(config: Config, system: str) -> Config:
    """The configuration for a system's name."""
    engine, _, stage = system.partition("-")
    if engine == "torchtitan":  # in processes that are started as those of the sharded engine
        return dataclasses.replace(config, engine="sharded")
    changes: dict[str, Any] = {"engine": engine}
    if engine != "plain":
        changes[engine] = dataclasses.replace(getattr(config, engine), stage=int(stage))
    return dataclasses.replace(config, **changes)


def measure(config: Config, system: str, gpus: int, steps: int) -> dict[str, Any]:
    """Run a system on so many processes. Raises Failed."""
    timed = dataclasses.replace(with_engine(config, system), name="scaling")
    setting = {"shape": config.name, "gradient_accumulation": timed.train.gradient_accumulation}
    with tempfile.TemporaryDirectory(prefix="p828-scaling-") as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps({"config": to_dict(timed), "steps": steps, "system": system}))
        if system == "plain":
            found = each_by_itself(job, gpus, timed.train.device)
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
            run_within(ROW_SECONDS, [command_of(job, *launcher)], [single_threaded()])
            found = json.loads(job.with_suffix(".result").read_text())
    tokens = timed.tokens_per_step  # of one GPU
    return {"system": system, "gpus": gpus, **setting, "tokens_per_step": tokens, **found}


def each_by_itself(job: Path, gpus: int, device: str) -> dict[str, Any]:
    """What several GPUs take that know nothing of each other, started together.

    `seconds` is the harmonic mean of theirs, and a product's FLOP/s the mean.
    """
    jobs = [job.with_name(f"job{number}.json") for number in range(gpus)]
    environments = [single_threaded() for _ in jobs]
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        for environment, gpu in zip(environments, visible, strict=False):
            environment["CUDA_VISIBLE_DEVICES"] = gpu
    for own in jobs:
        own.write_bytes(job.read_bytes())
    run_within(ROW_SECONDS, [command_of(own) for own in jobs], environments)
    found = [json.loads(own.with_suffix(".result").read_text()) for own in jobs]
    seconds, products = ([one[key] for one in found] for key in ("seconds", "product_flops"))
    return found[0] | {
        "seconds": statistics.harmonic_mean(seconds),
        "own_seconds": seconds,
        "product_flops": None if None in products else statistics.mean(products),
        "memory_bytes": max(one["memory_bytes"] for one in found),
    }


def command_of(job: Path, *launcher: str) -> list[str]:
    return [sys.executable, *launcher, __file__, "--worker", str(job)]


def single_threaded() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run_within(seconds: float, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Run commands to their ends at the same time, or kill those that run and what they started. Raises Failed."""
    deadline, running = time.monotonic() + seconds, list[tuple[subprocess.Popen[bytes], IO[bytes]]]()
    with ExitStack() as stack:
        for command, environment in zip(commands, environments, strict=True):
            said = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
            stack.callback(kill, process)
            running.append((process, said))
        for process, _ in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        failures = []
        for number, (process, said) in enumerate(running):
            code = process.poll()
            if code != 0:
                said.seek(0)
                ended = f"not done in {seconds:.0f} s" if code is None else f"exit code {code}"
                failures.append(f"process {number}, {ended}:\n{said.read().decode(errors='replace')[-3000:]}")
    if failures:
        raise Failed("\n".join(failures))


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, if it runs."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def work(job: dict[str, Any], result: Path) -> None:
    config = from_dict(job["config"], "job")
    with counted() as passed, joined(config) as ranks:
        engine = build(config, job["system"], ranks)
        seed = dataclasses.replace(config.train, seed=config.train.seed + ranks.rank)
        batches = rotate(random_batches(dataclasses.replace(config, train=seed), engine.device))

        def run() -> None:
            step(config, engine, batches, ranks)

        started = time.perf_counter()
        run()
        first = time.perf_counter() - started
        for _ in range(WARM_UP):
            run()
        passed.clear()
        run()
        in_a_step = dict(passed)
        seconds = statistics.median(step_seconds(run, job["steps"], engine.device))
        seconds, memory = map(max, zip(*ranks.all_gather([seconds, peak_memory(engine.device)]), strict=True))
        is_gpu = engine.device.type == "cuda"
        busy = occupation(run) if is_gpu else None
        if ranks.is_first:
            found = {
                "seconds": seconds,
                "first_step_seconds": first,
                "memory_bytes": memory,
                "passed_bytes": in_a_step,
                "occupation": busy,
                "peak_flops": peak_flops(engine.device),
                "product_flops": matmul_flops(engine.device) if is_gpu else None,
                "device": torch.cuda.get_device_name() if is_gpu else "CPU",
            }
            result.write_text(json.dumps(found))


class Training(Protocol):
    """What is timed: an engine, or another library's training."""

    device: torch.device

    def forward_backward(self, batch: Batch, num_targets: int) -> None: ...

    def step(self, learning_rate: float) -> object: ...


def build(config: Config, system: str, ranks: ProcessGroup) -> Training:
    if system.startswith("torchtitan"):
        from peers.torchtitan_fsdp import FsdpTraining

        return FsdpTraining(config, pick_device(config.train.device), ranks.size, reshards=system.endswith("3"))
    if system == "plain":
        return PlainEngine(config)
    if config.engine == "sharded":
        return ShardedEngine(config, ranks)
    return DeepSpeedEngine(config, ranks, check_deepspeed(config, ranks))


def step(config: Config, engine: Training, batches: Iterator[Batch], ranks: ProcessGroup) -> None:
    """What the training loop does."""
    own = [next(batches) for _ in range(config.train.gradient_accumulation)]
    num_targets = int(ranks.all_reduce([sum(batch.num_targets for batch in own)])[0])
    for batch in own:
        engine.forward_backward(batch, num_targets)
    engine.step(config.optimizer.learning_rate)


def heading(config: Config, device: str) -> str:
    """The head of the table, in Markdown."""
    parameters = count_parameters(config.model).total / 1e6
    return (
        f"{config.name}: {parameters:.0f} M parameters, {config.train.gradient_accumulation} x "
        f"{config.train.micro_batch_size} x {config.data.sequence_length} tokens a step and GPU, {device}\n\n"
        f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"
    )


def row(config: Config, results: list[dict[str, Any]]) -> str:
    """The row of the last result."""
    micro_batch = config.train.micro_batch_size * config.data.sequence_length
    flops = training_flops(config.model, micro_batch, attended_pairs(config)) / micro_batch
    flops_of_rows = training_flops(config.model, 1, config.data.sequence_length)
    rates = {(result["system"], result["gpus"]): config.tokens_per_step / result["seconds"] for result in results}
    result = results[-1]
    system, gpus, rate = result["system"], result["gpus"], rates[result["system"], result["gpus"]]
    bases = [("plain", 1), ("plain", gpus), (system, 1)]
    efficiencies = [f"{rate / rates[base]:.1%}" if base in rates else "" for base in bases]
    peak, product = result["peak_flops"], result["product_flops"]
    counts = [(flops, peak), (flops, product), (flops_of_rows, peak)]
    shares = ["" if most is None else f"{a_token * rate / most:.1%}" for a_token, most in counts]
    busy = [f"{1e3 * seconds:.1f}" for seconds in result["occupation"] or ()] or ["", ""]
    cells = (
        system, str(gpus), f"{result['seconds'] * 1e3:.1f}", f"{rate * gpus:,.0f}", *efficiencies, *shares,
        f"{result['memory_bytes'] / 1e9:.2f}", f"{sum(result['passed_bytes'].values()) / 1e9:.2f}", *busy,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def check(config: Config, system: str, gpus: int) -> str:
    """Losses of one GPU, and of several with a rank killed on the way and the rest of the steps on half as many."""
    with tempfile.TemporaryDirectory(prefix="p828-scaling-") as directory:
        losses = []
        for name, counts in (("one", [1]), ("several", [gpus, max(gpus // 2, 1)])):
            for number, count in enumerate(counts):
                process = start_training(config, system, name, count, gpus // count, directory)
                if len(counts) > 1 and number == 0:
                    kill_a_rank(process, Path(directory) / "runs" / name / file_names.RECORDS_FILE)
                elif process.wait():
                    raise SystemExit(f"{system} on {count} failed; the log: {Path(directory, 'log').read_text()}")
            records = metrics.read(Path(directory) / "runs" / name / file_names.RECORDS_FILE)
            losses.append([line["loss"] for line in records if line["kind"] == "step"])
    assert len(losses[0]) == len(losses[1]) == CHECKED_STEPS
    distance = max(abs(first - second) for first, second in zip(*losses, strict=True))
    return (
        f"{system}: {CHECKED_STEPS} steps of {config.name} on 1 GPU, and on {gpus} with the last rank killed after "
        f"step {KILLED_AFTER} and the rest on {max(gpus // 2, 1)}: losses at most {distance:.2g} nats apart, "
        f"{losses[0][0]:.3f} to {losses[0][-1]:.3f}"
    )


def start_training(
    config: Config, system: str, name: str, gpus: int, accumulation: int, directory: str
) -> subprocess.Popen[bytes]:
    """`p828 train` on this interpreter's standard library, with the shape's sizes."""
    train = dataclasses.replace(config.train, steps=CHECKED_STEPS, gradient_accumulation=accumulation)
    tokens = min(config.model.vocab_size, 4096)
    config = dataclasses.replace(
        with_engine(Config(), system), name=name, model=config.model, train=train,
        data=dataclasses.replace(Config().data, sequence_length=config.data.sequence_length),
        tokenizer=dataclasses.replace(Config().tokenizer, vocab_size=tokens, training_megabytes=2),
        schedule=dataclasses.replace(config.schedule, kind="constant", warmup_steps=2),
        evaluation=dataclasses.replace(config.evaluation, every=0, rows=4, prompts=()),
        checkpoint=dataclasses.replace(config.checkpoint, every=KILLED_AFTER // 2),
    )  # fmt: skip
    path = Path(directory) / f"{name}.toml"
    path.write_text(tomli_w.dumps(to_dict(config)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "p828"]
    log = open(Path(directory) / "log", "wb")  # noqa: SIM115 (the process has it)
    return subprocess.Popen([sys.executable, *launcher, "train", str(path)], cwd=directory, stdout=log, stderr=log)


def kill_a_rank(launcher: subprocess.Popen[bytes], records: Path) -> None:
    """`kill -9` for the last rank once the records have come to a step; waits for the end of the others."""
    while launcher.poll() is None and not (
        records.exists() and records.read_bytes().count(b'"kind": "step"') > KILLED_AFTER
    ):
        time.sleep(0.2)
    workers = psutil.Process(launcher.pid).children()
    max(workers, key=lambda worker: worker.pid).kill()
    launcher.wait()


if __name__ == "__main__":
    main()
