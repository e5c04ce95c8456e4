"""The process group: the ranks that train one run together, and their collective calls about numbers and errors.

Rank 0 opens the run's directory, prints and records. `on_rank_0` runs a function there alone and broadcasts its result.
Where any rank may meet an error by itself, `raise_together` raises it on all ranks, so that they end with one message.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p828.config import Config
from p828.distributed.launcher import ALL_SET, after_restart, check_launch, launched, tell_launcher
from p828.distributed.own_gpu import check_own_gpus, gpu_of, take_gpu
from p828.distributed.watchdog import Watchdog, connect_watchdog
from p828.errors import ConfigError, P828Error, RunFailed, closed_after

T = TypeVar("T")
E = TypeVar("E", bound=P828Error)
RECORDED_OPERATIONS = "1000"  # collective operations that PyTorch's flight recorder keeps
NO_BLOCKS = "2"  # NCCL's name for copying without thread blocks, where it can (engine/sharded/registered.py)
AFTER_WATCHDOG = 60  # seconds that PyTorch waits longer than the watchdog, whose report says more


@dataclass
class ProcessGroup:
    """This process as rank `rank` of `size`, or alone. All ranks must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Of gloo, for values on the host; tensors on a GPU go by PyTorch's default group."""
    watchdog: Watchdog | None = None
    timeout: timedelta | None = None
    """After which a collective call fails that another rank does not make."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers as float64, by rank; each rank must give equally many. Integers are exact to 2^53."""
        if self.size == 1:
            return [[float(value) for value in values]]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        self._progressed()
        return [tensor.tolist() for tensor in found]

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, added in the order of ranks, so that all ranks have the same bits."""
        return [sum(of_ranks) for of_ranks in zip(*self.all_gather(values), strict=True)]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, by rank. It is pickled on the way, between processes of this run alone."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        self._progressed()
        return found

    def on_host(self) -> tuple[int, int]:
        """This rank's index among the ranks of its host, and the number of ranks on the host."""
        own = [
            rank
            for rank, host in enumerate(self.all_gather_object(socket.gethostname()))
            if host == socket.gethostname()
        ]
        return own.index(self.rank), len(own)

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Run the function on rank 0 alone and return its result on all ranks.

        A P828Error of the function is raised on all ranks; another error is raised on rank 0 alone.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except P828Error as error:
                outcome[1] = error
        with _not_hiding(outcome[1]):
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        self._progressed()
        if outcome[1] is not None:
            raise self.on_all_ranks(outcome[1])
        return outcome[0]

    def new_group(self) -> "ProcessGroup":
        """A second group of the same ranks, for another thread: its calls may come between those of this one."""
        if self.size == 1:
            return self
        return ProcessGroup(self.rank, self.size, dist.new_group(backend="gloo", timeout=self.timeout))

    def on_all_ranks(self, error: E) -> E:
        """Mark an error that all ranks raise now, so that rank 0 alone shows it; returns the error."""
        error.is_everywhere = self.size > 1
        return error

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise a P828Error that the block raises on any rank on all ranks, with the rank's number.

        The block must make no collective calls. Of several ranks' errors the lowest rank's is raised.
        """
        error: P828Error | None = None
        try:
            yield
        except P828Error as found:
            error = found
        with _not_hiding(error):
            errors = self.all_gather_object(error)
        rank, error = next(((rank, error) for rank, error in enumerate(errors) if error is not None), (0, None))
        if error is not None:
            if rank:
                error.args = (f"rank {rank}: {error}",)
            raise self.on_all_ranks(error)

    def _progressed(self) -> None:
        if self.watchdog is not None:
            self.watchdog.progressed()


@contextmanager
def _not_hiding(found: BaseException | None) -> Iterator[None]:
    """Raise the error `found` where the block fails to tell the other ranks of it, as when one of them has died."""
    try:
        yield
    except Exception:
        if found is None:
            raise
        raise found from None


@contextmanager
def joined(config: Config) -> Iterator[ProcessGroup]:
    """Join the process group that the launcher started, and leave it however the block ends.

    Raises ConfigError for several ranks with the plain engine, as `check_launch` and as `check_own_gpus`;
    LocalRankError where the process sees fewer GPUs than ranks; RunFailed where the others cannot be reached.
    """
    check_launch()
    rank, size, local_rank, is_launched, _ = launched()
    if config.engine == "plain":
        if size > 1:
            raise ConfigError(f'engine = "plain" trains on one device, and WORLD_SIZE = {size}: give --engine sharded')
        yield ProcessGroup()
        return
    device = take_gpu(config.train.device, local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_OPERATIONS)
    if config.engine == "sharded":  # collective operations beside kernels of a layer: at once, on all ranks
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        os.environ.setdefault("NCCL_CTA_POLICY", NO_BLOCKS)
    timeout = timedelta(seconds=config.timeout_seconds + AFTER_WATCHDOG)
    with _initialised(device, is_launched, timeout):
        ranks = ProcessGroup(rank, size, dist.new_group(backend="gloo", timeout=timeout), timeout=timeout)
        gpus = ranks.all_gather_object(gpu_of(device))
        with ranks.raise_together():
            check_own_gpus(gpus)
        if size > 1:
            ranks.watchdog = connect_watchdog(
                rank, size, ranks.all_gather_object, config.timeout_seconds, config.run_dir
            )
        with closed_after(ranks.watchdog.close if ranks.watchdog is not None else lambda: None):
            try:
                yield ranks
            except BaseException as error:
                if ranks.watchdog is not None and not getattr(error, "is_everywhere", False):
                    code = ranks.watchdog.failed(error)
                    if code is not None:
                        tell_launcher(f"p828: {str(error) or 'interrupted'}")
                        raise SystemExit(code) from None
                raise


@contextmanager
def _initialised(device: torch.device, is_launched: bool, timeout: timedelta) -> Iterator[None]:
    """PyTorch's default process group: of the launcher's processes, or of this one alone."""
    backend, before = "nccl" if device.type == "cuda" else "gloo", dict(os.environ)
    if is_launched:
        _join(backend, timeout)
    else:
        os.environ.update(_OF_ONE_PROCESS)
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)

    def leave() -> None:
        if not is_launched:
            for name in _OF_ONE_PROCESS:
                os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
        if device.type == "cuda" and sys.exc_info()[0] is not None:
            dist.distributed_c10d._abort_process_group()  # collective operations under way on the GPU would never end
        else:
            dist.destroy_process_group()

    with closed_after(leave):
        yield


def _join(backend: str, timeout: timedelta) -> None:
    """Join the launcher's processes. Raises RunFailed where they cannot be reached, or do not come."""
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:  # what NCCL and gloo raise, and PyTorch of its store
        rank, size, host, port = (os.environ[name] for name in ALL_SET)
        reason = str(error).partition("\n")[0]  # C++ frames follow
        where = f"rank {rank} of {size} cannot join the others by {host}, port {port}"
        raise RunFailed(f"{where}: {reason}{after_restart()}") from None


_OF_ONE_PROCESS = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads these
