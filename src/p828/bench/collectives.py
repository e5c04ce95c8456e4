"""Counting what ranks pass to collective operations, and how long a GPU does nothing but that."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

COUNTED = (
    "all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all_single",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes by operation, of all that is called in the block through functions that were taken from torch in it.

    What counts is the whole: the input of a reduction, the output of a gathering.
    """
    found: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = (x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor))
            found[name] += max(tensor.nbytes for tensor in tensors)
            return function(*arguments, **keywords)

        return call

    try:
        for name, function in before.items():
            setattr(dist, name, counting(name, function))
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


class Occupation(NamedTuple):
    """Seconds of a GPU in one step."""

    communication: float
    """A collective operation runs."""
    exposed: float
    """A collective operation runs and nothing else."""


def occupation(run: Callable[[], None]) -> Occupation:
    """Of what `run` starts on this process's GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    assert profiler.profiler is not None
    communicating: list[tuple[int, int]] = []
    computing: list[tuple[int, int]] = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA:
            interval = event.start_ns(), event.start_ns() + event.duration_ns()
            (communicating if _is_of_nccl(event.name()) else computing).append(interval)
    communication, both = _length(communicating), _length(computing) + _length(communicating)
    overlap = both - _length([*communicating, *computing])
    return Occupation(communication / 1e9, (communication - overlap) / 1e9)


def _is_of_nccl(name: str) -> bool:
    """Whether a profiler names so a kernel of NCCL, or a copy from GPU to GPU, as NCCL has copy engines make them."""
    return "nccl" in name.lower() or "PtoP" in name


def _length(intervals: Iterable[tuple[int, int]]) -> int:
    """Of the union of (start, end) intervals."""
    total, reached = 0, -1
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total
