"""Seconds of steps, and the speed of a large matrix product and of memory, by the device's own clock."""

import itertools
import time
from collections.abc import Callable
from typing import Protocol

import torch

LEAST_WAIT = 0.02  # of a step: what the host waits less for the GPU's numbers is their way


def step_seconds(run: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Seconds from the end of each call to the end of the next, `steps` of them, without waiting in between.

    A GPU's queue stays as full as `run` keeps it, as in training.
    """
    if device.type == "cuda":
        marks = [_record()]
        for _ in range(steps):
            run()
            marks.append(_record())
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
    times = [time.perf_counter()]
    for _ in range(steps):
        run()
        times.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(times)]


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a square product of random numbers: bfloat16 of 8,192 on a GPU, float32 of 1,024 on a CPU.

    The fastest of many: it stands for what the machine can do, and others may be using it too.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    return 2 * size**3 / min(step_seconds(product, 40, device))


def host_copy_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second from pinned memory of the host to a GPU, and back: the fastest of several copies of 256 MiB."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)

    def forth() -> None:
        there.copy_(host, non_blocking=True)

    def back() -> None:
        host.copy_(there, non_blocking=True)

    to_device, from_device = (host.nbytes / min(step_seconds(work, 10, device)) for work in (forth, back))
    return to_device, from_device


def memory_rate(device: torch.device) -> float:
    """Bytes a second between the device and its memory, of numbers far more than its caches hold.

    The fastest of many readings (a sum, and products with a vector) and copies, of which each byte is read and written.
    """
    source = torch.ones(2**30 if device.type == "cuda" else 2**25, device=device)  # float32
    target = torch.empty_like(source)
    matrices_PVH = source.view(64, -1, 1024)
    vectors_PH1 = torch.ones(64, 1024, 1, device=device)

    def read() -> None:
        torch.sum(source)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.bmm(matrices_PVH, vectors_PH1)

    reading, multiplying, copying = (min(step_seconds(work, 20, device)) for work in (read, multiply, copy))
    return max(source.nbytes / min(reading, multiplying), 2 * source.nbytes / copying)


class Work(Protocol):
    """What a GPU was given up to some moment, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether all of it is done."""


class DeviceSpan:
    """The seconds from a step's numbers to the next one's in which the device was at work, by the host's clock."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._paused: float | None = None
        self._apart = 0.0
        """Seconds between calls of the engine."""
        self._ended = 0.0
        self._left: Work | None = None
        """What the last step left to its GPU when its numbers had come."""

    def begin(self) -> None:
        """Called before every micro-batch and the update; the step's first call begins the span.

        A GPU that is still at work on what the last step left has not rested since that one's end.
        """
        now = time.perf_counter()
        if self._begun is None:
            is_at_work = self._left is not None and not self._left.query()
            self._begun, self._apart = self._ended if is_at_work else now, 0.0
        elif self._paused is not None:
            self._apart += now - self._paused
        self._paused = None

    def pause(self) -> None:
        """Called after every micro-batch: a GPU works on, a CPU does what the loop does until the next one."""
        self._paused = time.perf_counter()

    def end(self, waited: float, left: Work | None) -> float | None:
        """How long the device was at work, now that the host has waited `waited` seconds for the step's numbers.

        `left` is all that the step has given to its GPU, None on a CPU. A host that runs ahead of a GPU keeps it busy
        from the first work on. Where it hardly had to wait and nothing is left, the GPU had caught up with it all
        along, as when kernels are launched one by one too slowly, and idled in between; then the wait is all that is
        known of its work. A CPU is its own host, at work on the model in the engine's calls alone. None without a call
        of `begin`.
        """
        if self._begun is None:
            return None
        self._ended, self._left = time.perf_counter(), left
        span, self._begun, self._paused = self._ended - self._begun, None, None
        if left is None:
            return span - self._apart
        return span if waited > LEAST_WAIT * span or not left.query() else waited


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
