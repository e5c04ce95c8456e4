"""Time a training step on 1, 2, 4, … GPUs of this machine at each ZeRO stage.

usage: python benchmarks/scaling.py [--shape 800m] [--gpus 1 2 4] [--systems plain 1 2 3] [--steps 10]
           [--gradient-accumulation N] [--micro-batch-size N] [--device cuda] [--json FILE]

A row each: tokens a second, efficiency against one GPU of the same system, memory, bytes that a rank passes to
collective operations in a step, and of the step's time the communication and its part that nothing else covers.
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
from pathlib import Path
from typing import Any

import torch

from p828.bench.batches import random_batches
from p828.bench.collectives import counted, occupation
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.bench.timing import step_seconds
from p828.config import Config, from_dict
from p828.config_values import to_dict
from p828.data.loader import Batch
from p828.model.flops import count_parameters, flops_per_token
from p828.train.device import peak_flops, peak_memory
from p828.train.engine import Engine, PlainEngine
from p828.train.engine_deepspeed import DeepSpeedEngine, check_deepspeed
from p828.train.ranks import Ranks, joined

WARM_UP = 3
COLUMNS = (
    "GPUs",
    "ms a step",
    "tokens/s",
    "efficiency",
    "MFU",
    "memory, GB",
    "passed, GB",
    "communication, ms",
    "exposed, ms",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="800m")
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--systems", nargs="+", default=["plain", "1", "2", "3"], help="plain, or a ZeRO stage")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--gradient-accumulation", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker.read_text()), given.worker.with_suffix(".result"))
        return
    config = load_shape(given.shape, given.device, given.micro_batch_size, given.gradient_accumulation)
    gpus = given.gpus or list(doubling(torch.cuda.device_count() if given.device == "cuda" else 2))
    results = []
    for system in given.systems:
        for count in gpus if system != "plain" else [1]:
            try:
                results.append(measure(config, system, count, given.steps))
            except subprocess.CalledProcessError as error:
                print(f"{system} on {count} failed:\n{error.stderr[-4000:]}", file=sys.stderr, flush=True)
                continue
            print(f"{system} on {count}: {results[-1]['seconds'] * 1e3:.1f} ms", file=sys.stderr, flush=True)
    print(table(config, results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def doubling(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2


def measure(config: Config, system: str, gpus: int, steps: int) -> dict[str, Any]:
    """Run a system on so many processes. Raises CalledProcessError with what they said."""
    engine = "plain" if system == "plain" else "deepspeed"
    deepspeed = dataclasses.replace(config.deepspeed, stage=0 if system == "plain" else int(system))
    config = dataclasses.replace(config, name="scaling", engine=engine, deepspeed=deepspeed)
    with tempfile.TemporaryDirectory(prefix="p828-scaling-") as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps({"config": to_dict(config), "steps": steps}))
        command = [sys.executable, __file__, "--worker", str(job)]
        if engine == "deepspeed":
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return {"system": system, "gpus": gpus, **json.loads(job.with_suffix(".result").read_text())}


def work(job: dict[str, Any], result: Path) -> None:
    config = from_dict(job["config"], "job")
    with counted() as passed, joined(config) as ranks:
        engine: Engine = build(config, ranks)
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
        memory = max(row[0] for row in ranks.all([peak_memory(engine.device)]))
        is_gpu = engine.device.type == "cuda"
        busy = occupation(run) if is_gpu else None
        if ranks.is_first:
            found = {
                "seconds": max(row[0] for row in [[seconds]]),
                "first_step_seconds": first,
                "memory_bytes": memory,
                "passed_bytes": in_a_step,
                "occupation": busy,
                "peak_flops": peak_flops(engine.device),
                "device": torch.cuda.get_device_name() if is_gpu else "CPU",
            }
            result.write_text(json.dumps(found))


def build(config: Config, ranks: Ranks) -> Engine:
    if config.engine == "plain":
        return PlainEngine(config)
    return DeepSpeedEngine(config, ranks, check_deepspeed(config, ranks))


def step(config: Config, engine: Engine, batches: Iterator[Batch], ranks: Ranks) -> None:
    """What the training loop does."""
    own = [next(batches) for _ in range(config.train.gradient_accumulation)]
    num_targets = int(ranks.sum([sum(batch.num_targets for batch in own)])[0])
    for batch in own:
        engine.forward_backward(batch, num_targets)
    engine.step(config.optimizer.learning_rate)


def table(config: Config, results: list[dict[str, Any]]) -> str:
    """A Markdown table for each system."""
    parameters = count_parameters(config.model).total / 1e6
    flops = flops_per_token(config.model, config.data.sequence_length)
    lines = [
        f"{config.name}: {parameters:.0f} M parameters, {config.train.gradient_accumulation} x "
        f"{config.train.micro_batch_size} x {config.data.sequence_length} tokens a step and GPU, "
        + results[0]["device"],
    ]
    alone: dict[str, float] = {}
    for result in results:
        if result["system"] not in alone:
            lines += ["", f"| {result['system']} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        rate = config.tokens_per_step * result["gpus"] / result["seconds"]
        each = alone.setdefault(result["system"], rate / result["gpus"])
        mfu = "" if result["peak_flops"] is None else f"{flops * rate / result['gpus'] / result['peak_flops']:.1%}"
        communication, exposed = (f"{1e3 * x:.1f}" for x in result["occupation"]) if result["occupation"] else ("", "")
        efficiency = rate / result["gpus"] / each
        cells = (
            str(result["gpus"]), f"{result['seconds'] * 1e3:.1f}", f"{rate:,.0f}", f"{efficiency:.1%}", mfu,
            f"{result['memory_bytes'] / 1e9:.2f}", f"{sum(result['passed_bytes'].values()) / 1e9:.2f}",
            communication, exposed,
        )  # fmt: skip
        lines.append("| | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
