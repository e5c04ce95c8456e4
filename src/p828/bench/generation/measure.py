"""What a measuring process finds out: the rate of memory, or how fast one system generates."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from p828.bench.generation.generator import Generator
from p828.bench.generation.own import OwnGenerator
from p828.bench.generation.workload import RUNS, Item, Workload, random_prompts, workload_from_dict
from p828.bench.peers import peer_generator
from p828.bench.systems import System, system_from_dict
from p828.system.device import peak_memory, pick_device
from p828.system.timing import memory_rate

EXPERT_STEPS = 16
"""Steps in which the experts that are gone through are counted."""


def describe_memory(device_name: str) -> dict[str, Any]:
    device = pick_device(device_name)
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "bytes_per_second": memory_rate(device),
    }


def measure_generation(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the system weighs, then a result for each item of the job as soon as it is known."""
    system, work = system_from_dict(job["system"]), workload_from_dict(job["work"])
    generator = _built(system, Path(job["benchmarks"]) if job["benchmarks"] else None)
    yield {"dtype": generator.dtype}
    for values in job["items"]:
        item = Item(**values)
        found = _measured(generator, item, work, system.config.model.vocab_size)
        yield {"item": values, **found, "peak_memory_bytes": peak_memory(pick_device(system.config.train.device))}


def _measured(generator: Generator, item: Item, work: Workload, vocab_size: int) -> dict[str, Any]:
    if item.batch:
        return _steps(generator, random_prompts(vocab_size, item.batch, work.prompt_length), work.new_tokens)
    (prompt,) = random_prompts(vocab_size, 1, item.first_token or item.recompute)
    if item.first_token:
        return {"seconds": _median([generator.first_token(prompt) for _ in range(RUNS + 2)][2:])}
    assert isinstance(generator, OwnGenerator)
    forward = [generator.recomputed(item.recompute) for _ in range(RUNS + 1)][1:]
    steps = [generator.steps([prompt], work.new_tokens, False).seconds for _ in range(RUNS + 1)][1:]
    return {"forward_seconds": _median(forward), "step_seconds": _median(steps)}


def _steps(generator: Generator, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    generator.steps(prompts, steps, False)
    greedy = [generator.steps(prompts, steps, False) for _ in range(RUNS)]
    seconds = [timed.seconds for timed in greedy]
    found: dict[str, Any] = {
        "seconds": _median(seconds),
        "seconds_range": (min(seconds), max(seconds)),
        "cached_tokens": _median([timed.cached_tokens for timed in greedy]),
    }
    if isinstance(generator, OwnGenerator):
        generator.steps(prompts, steps, True)
        found["sampled_seconds"] = _median([generator.steps(prompts, steps, True).seconds for _ in range(RUNS)])
        found["distinct_experts"] = generator.distinct_experts(prompts, min(steps, EXPERT_STEPS))
    return found


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _built(system: System, benchmarks: Path | None) -> Generator:
    """p828's, or a peer's, whose code is in the repository's `benchmarks`."""
    if benchmarks is None:
        return OwnGenerator(system.config)
    generator: Generator = peer_generator(system, benchmarks)
    return generator
