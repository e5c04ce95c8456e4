"""Whether two runs came to the same."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from p828.runs import checkpoint
from p828.runs import records as metrics
from p828.runs.layout import RECORDS_FILE

OF_THE_MACHINE = ("tokens_per_second", "mfu", "memory_bytes", "seconds")  # what two equal runs record differently


def first_difference(first: Path, second: Path) -> str | None:
    """The first thing in which two runs' newest checkpoints or records differ by a bit, in words; None if nothing.

    Compared are weights, balance bias, optimizer, random states, progress, place in the data, and every record but
    times, memory and events. Raises ConfigError if one has no checkpoint.
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
    """How far apart the losses of two runs are at most, in nats; and the first thing about their data that differs.

    For runs whose sums were in another order, as on another number of ranks. The place in the data at the end is
    compared, which belongs to no rank, and of every step its rows, by their digest.
    Raises ConfigError as `first_difference`.
    """
    ours, theirs = (
        [line for line in metrics.read(run / RECORDS_FILE) if line["kind"] == "step"] for run in (first, second)
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
    """Infinite if one alone is not a number."""
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
    """(numbers, bytes of one): what tells 0.0 from -0.0, and takes a NaN for itself."""
    return tensor.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.element_size())


def _of_values(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _of_values(f"{where}.{key}", ours[key], theirs[key])
    elif json.dumps(ours) != json.dumps(theirs):  # where NaN is NaN
        yield f"{where} is {ours} and {theirs}"


def _of_records(first: Path, second: Path) -> Iterator[str]:
    for ours, theirs in itertools.zip_longest(_kept_records(first), _kept_records(second)):
        if ours is None or theirs is None:
            yield "one has more records than the other"
            return
        where = f"record {ours['kind']} of step {ours['step']}"
        yield from _of_values(where, ours, theirs)


def _kept_records(run: Path) -> Iterator[dict[str, Any]]:
    for line in metrics.read(run / RECORDS_FILE):
        if line["kind"] in metrics.REPEATED_KINDS:
            yield {key: value for key, value in line.items() if key not in OF_THE_MACHINE}
