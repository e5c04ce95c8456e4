"""A micro-batch as a CUDA graph.

A layer is some fifty kernels, and starting them one by one takes the host longer than a GPU needs to run them: 92 ms
against 62 at the sizes of `fine-grained` on an H100. No kernel depends on what the host would have to wait for, so all
of a micro-batch, forward and backward, is recorded once and then started by a single call.
"""

import gc
from collections.abc import Callable

import torch

from p828.data.loader import Batch

Key = tuple[torch.Size, bool]


class MicroBatchGraphs:
    """Calls `run(batch, is_first)`: the first time as it is, which compiles; then records and replays it.

    There is a graph for each batch shape and whether the micro-batch begins a step. They share their memory, since only
    one of them runs at a time and nothing that they allocate is used after them.
    """

    def __init__(self, run: Callable[[Batch, bool], None], device: torch.device) -> None:
        self._run, self._device = run, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Key] = set()
        self._recorded: dict[Key, tuple[torch.cuda.CUDAGraph, Batch]] = {}

    def __call__(self, batch: Batch, is_first: bool) -> None:
        key = (batch.tokens_BS.shape, is_first)
        if key not in self._seen:
            self._seen.add(key)
            self._run(batch.to(self._device), is_first)
            return
        if key not in self._recorded:
            self._recorded[key] = self._record(batch.to(self._device), is_first)
        graph, inputs = self._recorded[key]
        inputs.copy_(batch)
        graph.replay()

    def _record(self, inputs: Batch, is_first: bool) -> tuple[torch.cuda.CUDAGraph, Batch]:
        graph = torch.cuda.CUDAGraph()
        # An autograd graph that ran unrecorded, and that a reference cycle keeps, would tie this one to its stream.
        gc.collect()
        # It begins by freeing what ran unrecorded and left its memory reserved, as the graph brings its own. The
        # loader's thread pins memory meanwhile, which is no concern of this recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(inputs, is_first)
        return graph, inputs
