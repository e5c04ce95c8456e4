"""What a measuring process finds out: about the machine, or about one system."""

import importlib.metadata
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from p828.bench.batches import NUM_BATCHES, attended_pairs
from p828.bench.breakdown import break_down
from p828.bench.step import Step, build_step
from p828.bench.systems import system_from_dict
from p828.system.device import make_deterministic, peak_memory, pick_device
from p828.system.timing import matmul_flops, step_seconds


def describe_machine(device_name: str) -> dict[str, Any]:
    device = pick_device(device_name)
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matmul": "bfloat16 matrix product of 8,192" if is_gpu else "float32 matrix product of 1,024",
        "matmul_flops": matmul_flops(device),
    }


def measure_system(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first step and, in the median, of later ones; memory; what the weights are."""
    system = system_from_dict(job["system"])
    if system.config.train.deterministic:
        make_deterministic()
    step = build_step(system, job["routing"], Path(job["benchmarks"]) if job["benchmarks"] else None)
    started = time.perf_counter()
    step.run()
    synchronize(step)
    first_step_seconds = time.perf_counter() - started
    accumulation = system.config.train.gradient_accumulation
    # Every batch is seen before the clock runs: another number of documents may compile again.
    step_seconds(step.run, max(2, NUM_BATCHES // accumulation), step.device)
    timed = step_seconds(step.run, job["steps"], step.device)
    seconds = statistics.median(timed)
    parameters = list(step.model.parameters())
    result = {
        "version": importlib.metadata.version(system.framework),
        "step_seconds": seconds,
        "step_seconds_quartiles": quartiles(timed),
        "first_step_seconds": first_step_seconds,
        "peak_memory_bytes": peak_memory(step.device),
        "peak_reserved_bytes": peak_reserved(step.device),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": dtype_name(max(parameters, key=torch.numel).dtype),
        "moments": dtype_name(step.moments_dtype()),
        "attended_pairs": attended_pairs(system.config),
    }
    if job["breakdown"]:
        result["breakdown"] = break_down(step.run_traceably, seconds, accumulation, step.device)
    return result


def quartiles(values: list[float]) -> tuple[float, float]:
    """The values that a quarter lies below and above."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def peak_reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory(device)


def synchronize(step: Step) -> None:
    if step.device.type == "cuda":
        torch.cuda.synchronize()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
