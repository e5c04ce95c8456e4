"""The processes that train one run together, and what they tell each other.

Rank 0 speaks for the run: it enters the run's directory, prints and records. What only it can know, the others learn by
`on_rank_0`; where each may find something wrong by itself, `raise_together` makes them end together, with one message.
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
from p828.distributed.launcher import launched
from p828.distributed.watchdog import Watchdog, connect_watchdog
from p828.errors import ConfigError, LocalRankError, RunPaused, RunStopped, closed_after

T = TypeVar("T")
E = TypeVar("E", bound=ConfigError | RunStopped | RunPaused)
RECORDED_OPERATIONS = "1000"  # that PyTorch's flight recorder keeps
AFTER_US = 60  # seconds that a collective operation may outlast our own time-out, which says more


@dataclass
class ProcessGroup:
    """This process among `size`, or alone. All ranks must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """For what is on the host: gloo, whatever the tensors' backend is."""
    watchdog: Watchdog | None = None
    timeout: timedelta | None = None
    """Of a call that others do not make."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everyone's numbers, as many on each rank, by rank. Whole ones are exact up to 2^53."""
        if self.size == 1:
            return [[float(value) for value in values]]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        self._progressed()
        return [tensor.tolist() for tensor in found]

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, added in the ranks' order, so that they are the same bits everywhere."""
        return [sum(of_ranks) for of_ranks in zip(*self.all_gather(values), strict=True)]

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        self._progressed()
        return found

    def on_host(self) -> tuple[int, int]:
        """This rank's number among the ranks of its host, and how many ranks the host has."""
        own = [
            rank
            for rank, host in enumerate(self.all_gather_object(socket.gethostname()))
            if host == socket.gethostname()
        ]
        return own.index(self.rank), len(own)

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """What the function gives on rank 0, where alone it runs; a ConfigError or RunStopped there is raised on all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except (ConfigError, RunStopped) as error:
                outcome[1] = error
        with _not_hiding(outcome[1]):
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        self._progressed()
        if outcome[1] is not None:
            raise self.on_all_ranks(outcome[1])
        return outcome[0]

    def new_group(self) -> "ProcessGroup":
        """The same ranks, whose calls may come between those of this object: for another thread."""
        if self.size == 1:
            return self
        return ProcessGroup(self.rank, self.size, dist.new_group(backend="gloo", timeout=self.timeout))

    def on_all_ranks(self, error: E) -> E:
        """An error that every rank raises now, marked so."""
        error.is_everywhere = self.size > 1
        return error

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """If the block, which calls nothing else here, raises an error of ours on a rank, raise it on all."""
        error: ConfigError | RunStopped | None = None
        try:
            yield
        except (ConfigError, RunStopped) as found:
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
    """Where the block cannot tell the other ranks of an error, as one of them has died, raise that error itself."""
    try:
        yield
    except Exception:
        if found is None:
            raise
        raise found from None


@contextmanager
def joined(config: Config) -> Iterator[ProcessGroup]:
    """Join the processes that the launcher started; leave them again, however the block ends.

    Raises ConfigError when the launcher's word and `engine` or the machine's GPUs do not go together.
    """
    rank, size, local_rank, is_launched = launched()
    if config.engine == "plain":
        if size > 1:
            raise ConfigError(
                f'engine = "plain" trains on one device, and WORLD_SIZE = {size}: give --engine deepspeed'
            )
        yield ProcessGroup()
        return
    device = _own_device(config.train.device, local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_OPERATIONS)
    timeout = timedelta(seconds=config.deepspeed.timeout_seconds + AFTER_US)
    before = dict(os.environ)
    if is_launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    else:  # one process, started without a launcher
        os.environ.update(_OF_ONE_PROCESS)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timeout,
        )

    def leave() -> None:
        if not is_launched:
            for name in _OF_ONE_PROCESS:
                os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
        if device.type == "cuda" and sys.exc_info()[0] is not None:
            dist.distributed_c10d._abort_process_group()  # what is under way on the GPU would never end
        else:
            dist.destroy_process_group()

    with closed_after(leave):
        ranks = ProcessGroup(rank, size, dist.new_group(backend="gloo", timeout=timeout), timeout=timeout)
        if size > 1:
            ranks.watchdog = connect_watchdog(
                rank, size, ranks.all_gather_object, config.deepspeed.timeout_seconds, config.run_dir
            )
        with closed_after(ranks.watchdog.close if ranks.watchdog is not None else lambda: None):
            try:
                yield ranks
            except BaseException as error:
                if ranks.watchdog is not None and not getattr(error, "is_everywhere", False):
                    code = ranks.watchdog.failed(error)
                    if code is not None:
                        raise SystemExit(code) from None
                raise


_OF_ONE_PROCESS = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # what DeepSpeed reads


def _own_device(wanted: str, local_rank: int) -> torch.device:
    """Make this rank's GPU the current one. Raises ConfigError if the machine has not as many."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LocalRankError(
            f"LOCAL_RANK = {local_rank}: {socket.gethostname()} shows {torch.cuda.device_count()} GPUs to PyTorch, "
            "and every process needs one of its own"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
