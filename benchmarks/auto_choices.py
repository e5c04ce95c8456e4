"""Measure what `auto` decides: attention backend and arithmetic of a training step on this machine.

usage: python benchmarks/auto_choices.py [CONFIG] [--steps N]      CONFIG: a preset's name or a .toml (quickstart)
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from p828.config import Config, load, with_vocabulary
from p828.data.batch import Batch
from p828.engine.plain import PlainEngine


def random_batch(config: Config) -> Batch:
    """Random tokens in documents of 100."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(config.model.vocab_size, (rows, length + 1))
    index = torch.arange(length).expand(rows, -1)
    return Batch(
        tokens[:, :-1].clone(), tokens[:, 1:].clone(), (index % 100).clone(), (index // 100).int(), rows * length
    )


def step_seconds(config: Config, steps: int) -> float:
    """Median seconds of one micro-batch, forward and backward, and an update."""
    engine, batch, seconds = PlainEngine(config), random_batch(config), []
    for _ in range(steps + 2):
        started = time.perf_counter()
        engine.forward_backward(batch, batch.num_targets)
        engine.step(1e-4)  # waits for its numbers; the update before them is in this step's time
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="quickstart")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    config = with_vocabulary(load(arguments.config))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{config.name} on {device}, torch {torch.__version__}")
    for backend, dtype, compiled in (
        ("flash", "float32", "off"), ("reference", "float32", "off"), ("flash", "float32", "on"),
        ("flash", "bfloat16", "off"), ("flash", "bfloat16", "on"),
    ):  # fmt: skip
        if torch.cuda.is_available() and (backend, dtype) == ("flash", "float32"):
            continue
        changed = replace(
            config,
            model=replace(config.model, attention_backend=backend),
            train=replace(config.train, dtype=dtype, compile=compiled),
        )
        seconds = step_seconds(changed, arguments.steps)
        tokens = config.train.micro_batch_size * config.data.sequence_length
        what = f"attention {backend}, {dtype}, compile {compiled}"
        print(f"{what:<45} {seconds * 1e3:8.1f} ms a step  {tokens / seconds:10,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
