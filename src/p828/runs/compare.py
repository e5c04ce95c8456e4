"""A diff of two runs: their newest checkpoints and their records."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from p828.runs import checkpoint, records
from p828.runs.file_names import RECORDS_FILE

OF_THE_MACHINE = (  # keys in which two equal runs differ
    "tokens_per_second", "mfu", "memory_bytes", "rank_memory_bytes", "disk_free_bytes", "seconds", "data_seconds",
    "host_seconds", "compilations",
)  # fmt: skip


def first_difference(first: Path, second: Path) -> str | None:
    """A sentence on the first bit in which two runs' newest checkpoints or records differ; None if all are equal.

    It compares weights, balance bias, optimizer, random states, progress, data position, and every record but times,
    memory and events. Raises ConfigError if a run has no checkpoint.
    """
    ours, theirs = (checkpoint.load(checkpoint.resolve(run)) for run in (first, second))
    if ours.step != theirs.step:
        return f"one ended at step {ours.step}, the other at step {theirs.step}"
    differences = itertools.chain(
        _of_tensors(ours.tensors, theirs.tensors),
        _of_values("progress", ours.state["progress"], theirs.state["progress"]),
        _of_values("data", ours.state["data"], theirs.state["data"]),
        _of_records(first, second),
    )
    return next(differences, None)


def distance_of_losses(first: Path, second: Path) -> tuple[float, str | None]:
    """The greatest difference of two runs' losses at the same step, in nats, and the first difference of their data.

    For runs that add floats in another order, as on another number of ranks. Of the data it compares the hash of every
    step's samples and the position at the end, which is the same for any number of ranks. Raises ConfigError as
    `first_difference` does.
    """
    ours, theirs = (
        [line for line in records.read(run / RECORDS_FILE) if line["kind"] == "step"] for run in (first, second)
    )
    if len(ours) != len(theirs):
        return float("inf"), f"one has records of {len(ours)} steps, the other of {len(theirs)}"
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "tokens", "documents", "cut_documents", "source_tokens", "rows", "lr"):
            if mine.get(key) != other.get(key):
                return float("inf"), f"step {mine['step']}: {key} is {mine.get(key)} and {other.get(key)}"
    ended = [checkpoint.load(checkpoint.resolve(run), names=()).state for run in (first, second)]
    if (difference := next(_of_values("data", ended[0]["data"], ended[1]["data"]), None)) is not None:
        return float("inf"), difference
    return max(_distance(mine["loss"], other["loss"]) for mine, other in zip(ours, theirs, strict=True)), None


def _distance(first: float, second: float) -> float:
    """The absolute difference; infinite if only one of them is NaN."""
    if math.isnan(first) or math.isnan(second):
        return 0.0 if math.isnan(first) and math.isnan(second) else math.inf
    return 0.0 if first == second else abs(first - second)


def _of_tensors(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> Iterator[str]:
    for part in {**ours, **theirs}:
        first, second = ours.get(part, {}), theirs.get(part, {})
        for name in {**first, **second}:
            if name not in first or name not in second:
                yield f"{part}: only one has {name}"
            elif (first[name].dtype, first[name].shape) != (second[name].dtype, second[name].shape):
                yield f"{part}: {name} has another shape or type"
            elif not torch.equal(*(bits := [_bits(tensor) for tensor in (first[name], second[name])])):
                unequal = int((bits[0] != bits[1]).any(1).sum())
                yield f"{part}: {unequal:,} of {first[name].numel():,} numbers of {name} differ"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """(numbers, bytes a number), in which 0.0 differs from -0.0 and a NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.element_size())


def _of_values(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _of_values(f"{where}.{key}", ours[key], theirs[key])
    elif json.dumps(ours) != json.dumps(theirs):  # in JSON a NaN equals a NaN
        yield f"{where} is {ours} and {theirs}"


def _of_records(first: Path, second: Path) -> Iterator[str]:
    for ours, theirs in itertools.zip_longest(_kept_records(first), _kept_records(second)):
        if ours is None or theirs is None:
            yield "one has more records than the other"
            return
        where = f"record {ours['kind']} of step {ours['step']}"
        yield from _of_values(where, ours, theirs)


def _kept_records(run: Path) -> Iterator[dict[str, Any]]:
    for line in records.read(run / RECORDS_FILE):
        if line["kind"] in records.REPEATED_KINDS and line["kind"] != "probe":  # which each start makes, too
            yield {key: value for key, value in line.items() if key not in OF_THE_MACHINE}
