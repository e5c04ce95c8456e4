"""A micro-batch as a CUDA graph.

A layer is some fifty kernels. Launching them one by one takes the host longer than a GPU needs to run them: 92 ms
against 62 at the sizes of `fine-grained` on an H100. No kernel depends on anything that the host would have to read
from the device. So a whole micro-batch, forward and backward, is captured once and later launched by a single call.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from p828.config import ModelConfig, TrainConfig
from p828.data.batch import Batch
from p828.model.backend import allows_cuda_graph
from p828.system.device import compiles

T = TypeVar("T")
Key = tuple[torch.Size, bool]


def is_capturable(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the host does nothing in a micro-batch but launch kernels.

    Without Triton kernels the experts read their loads on the host, and recomputation reads the random states there.
    """
    only_launches = allows_cuda_graph(model, device, dtype) and compiles(train, device)
    return only_launches and not train.gradient_checkpointing


class CudaGraphRunner(Generic[T]):
    """Iterates over `run(batch, is_first)`, from captured graphs where it can.

    The first micro-batch of a key runs as it is, which compiles the layers; the second is captured and replayed; all
    later ones are replayed. A key is a batch's shape and whether the micro-batch is the first of its step, which sets
    the gradients where later ones add to them.

    What happens up to each value that `run` yields is a graph of its own, so that the caller may start other work in
    between. The graphs share their memory: only one of them runs at a time, in the order of capture, and nothing that
    they allocate is used after them.
    """

    def __init__(self, run: Callable[[Batch, bool], Iterator[T]], values: int, device: torch.device) -> None:
        """`run` yields `values` values, and does nothing after the last one."""
        self._run, self._values, self._device = run, values, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Key] = set()
        self._captured: dict[Key, tuple[list[tuple[torch.cuda.CUDAGraph, T]], Batch]] = {}

    def __call__(self, batch: Batch, is_first: bool) -> Iterator[T]:
        key = (batch.tokens_BS.shape, is_first)
        if key not in self._seen:
            self._seen.add(key)
            yield from self._run(batch.to(self._device), is_first)
            return
        if key not in self._captured:
            inputs = batch.to(self._device)
            self._captured[key] = list(self._capture(inputs, is_first)), inputs
        graphs, inputs = self._captured[key]
        inputs.copy_(batch)
        for graph, value in graphs:
            graph.replay()
            yield value

    def _capture(self, inputs: Batch, is_first: bool) -> Iterator[tuple[torch.cuda.CUDAGraph, T]]:
        run = self._run(inputs, is_first)
        for _ in range(self._values):
            graph = torch.cuda.CUDAGraph()
            # Capture begins by freeing the memory that earlier micro-batches left reserved, as the graph has a pool of
            # its own. The loader's thread pins memory meanwhile, which "thread_local" keeps out of the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                value = next(run)
            yield graph, value
