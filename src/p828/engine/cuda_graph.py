"""A micro-batch as a CUDA graph.

A layer is some fifty kernels, and starting them one by one takes the host longer than a GPU needs to run them: 92 ms
against 62 at the sizes of `fine-grained` on an H100. No kernel depends on what the host would have to wait for, so all
of a micro-batch, forward and backward, is recorded once and then started by a single call.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from p828.data.batch import Batch

T = TypeVar("T")
Key = tuple[torch.Size, bool]


class CudaGraphRunner(Generic[T]):
    """Iterates over `run(batch, is_first)`: the first time as it is, which compiles; then records and replays it.

    What happens up to each value that `run` yields is a graph of its own, so that the caller may start other work in
    between. There are graphs for each batch shape and whether the micro-batch begins a step. They share their memory,
    since only one of them runs at a time, in the recorded order, and nothing that they allocate is used after them.
    """

    def __init__(self, run: Callable[[Batch, bool], Iterator[T]], values: int, device: torch.device) -> None:
        """`run` yields so many values, and does nothing after the last one."""
        self._run, self._values, self._device = run, values, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Key] = set()
        self._recorded: dict[Key, tuple[list[tuple[torch.cuda.CUDAGraph, T]], Batch]] = {}

    def __call__(self, batch: Batch, is_first: bool) -> Iterator[T]:
        key = (batch.tokens_BS.shape, is_first)
        if key not in self._seen:
            self._seen.add(key)
            yield from self._run(batch.to(self._device), is_first)
            return
        if key not in self._recorded:
            inputs = batch.to(self._device)
            self._recorded[key] = list(self._record(inputs, is_first)), inputs
        graphs, inputs = self._recorded[key]
        inputs.copy_(batch)
        for graph, value in graphs:
            graph.replay()
            yield value

    def _record(self, inputs: Batch, is_first: bool) -> Iterator[tuple[torch.cuda.CUDAGraph, T]]:
        run = self._run(inputs, is_first)
        for _ in range(self._values):
            graph = torch.cuda.CUDAGraph()
            # It begins by freeing what ran unrecorded and left its memory reserved, as the graph brings its own. The
            # loader's thread pins memory meanwhile, which is no concern of this recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                value = next(run)
            yield graph, value
