"""Time a captured decoding step with other tiles than the kernels take, and what each kernel takes by itself.

usage: python benchmarks/decode_kernels.py [SHAPE] [--rows 1 4 64 256] [--position N]

A step is the decoder's: kernels from the newest tokens to the next ones, in a CUDA graph, on random weights. A row
names what was changed; two rows of the unchanged step say how much the clock varies. A variant that does not run says
why, and the others go on. Needs an NVIDIA GPU.
"""

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from p828.bench.systems import load_shape
from p828.inference.decode.cache import SlotCache
from p828.inference.decode.kernel_step import kernel_step
from p828.inference.decode.rows import Rows
from p828.inference.decode.weights import decode_weights
from p828.inference.load import store_in
from p828.kernels.decode import (
    attention_triton,
    dependent_launch_triton,
    experts_triton,
    linear_triton,
    ops,
    route_triton,
    split_attention_triton,
    tokens_triton,
)
from p828.model.transformer import Transformer

REPLAYS, SHOWN = 40, 12
OF_FEW = [
    (dependent_launch_triton, "SHARED_PERCENT", -1),  # the driver's choice
    (dependent_launch_triton, "SHARED_PERCENT", 10),
    (dependent_launch_triton, "SHARED_PERCENT", 50),
    (experts_triton, "PAIR_GATE_UP", {"elements": 8192, "warps": 4}),
    (experts_triton, "PAIR_GATE_UP", {"elements": 4096, "warps": 4}),
    (experts_triton, "PAIR_GATE_UP", {"elements": 2048, "warps": 1}),
    (linear_triton, "VECTOR", {"elements": 2048, "warps": 1}),
    (linear_triton, "VECTOR", {"elements": 8192, "warps": 8}),
    (linear_triton, "VECTOR_TOKENS", 4),
    (route_triton, "WARPS", 8),
    (route_triton, "ELEMENTS", 0),
    (route_triton, "SPLIT_TOKENS", 0),
    (route_triton, "SPLIT_COLUMNS", 256),
    (tokens_triton, "BLOCK", 4096),
    (split_attention_triton, "KEYS", 16),
    (split_attention_triton, "KEYS", 64),
    (split_attention_triton, "ROWS", 64),
    (split_attention_triton, "WARPS", 2),
    (split_attention_triton, "WARPS", 8),
]
OF_ONE = [
    (experts_triton, "DOWN_OF_ONE", {"rows": 1, "warps": 1}),
    (experts_triton, "DOWN_OF_ONE", {"warps": 4}),
    (linear_triton, "LARGE", {"elements": 16384, "warps": 8}),
    (linear_triton, "LARGE", {"elements": 4096, "warps": 4}),
]
OF_SEVERAL = [
    (experts_triton, "DOWN_OF_SEVERAL", {"rows": 1, "warps": 1}),
    (experts_triton, "DOWN_OF_SEVERAL", {"rows": 4}),
    (linear_triton, "LARGE_OF_TWO", {"elements": 8192, "warps": 8}),
]
OF_MANY = [
    (dependent_launch_triton, "PROCESSORS", 0),
    (dependent_launch_triton, "MOST_ROWS", 256),
    (dependent_launch_triton, "AT_THE_END", dependent_launch_triton.NOT),
    (attention_triton, "TILES", {"keys": 64, "warps": 4}),
    (attention_triton, "PROGRAMS", 528),
    (experts_triton, "PAIR_TOKENS", 4),
    (linear_triton, "VECTOR_TOKENS", 4),
    (experts_triton, "GROUP_TOKENS", 64),
    (experts_triton, "GROUP_TOKENS_OF_MANY", 32),
    (experts_triton, "GROUP_GATE_UP", {"rows": 32}),
    (experts_triton, "GROUP_GATE_UP", {"stages": 4}),
    (experts_triton, "GROUP_GATE_UP", {"columns": 64, "stages": 4}),
    (experts_triton, "GROUP_DOWN", {"columns": 64, "stages": 4}),
    (linear_triton, "WIDE_OF_MANY", {"columns": 128, "stages": 3}),
    (dependent_launch_triton, "SHARE_ROWS", 256),  # the last: what kernels are asked for once, they keep
]


class Steps:
    """Steps of sequences in the slots of a cache, in which they stay where they are."""

    def __init__(self, model: Transformer, rows: int, position: int) -> None:
        config, device = model.config, model.head_weight.device
        self.model, self.position = model, position
        self.weights = decode_weights(model, config.vocab_size, torch.bfloat16)
        self.cache = SlotCache(config, rows, position + 128, device, torch.bfloat16)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        self.rows = Rows(rows, position + 128, config.vocab_size, device)
        self.rows.token_S.random_(config.vocab_size)
        self.arrivals_TG = torch.zeros(2 * rows, config.num_key_value_heads, dtype=torch.int32, device=device)
        self.told_SC = torch.zeros(rows + 1, position + 128, dtype=torch.int32, pin_memory=True)
        self.slots_T = torch.arange(rows, device=device)

    @torch.no_grad()
    def run(self) -> None:
        rows = self.rows
        logits_TV = kernel_step(self.weights, self.model, self.cache, rows, self.arrivals_TG, self.slots_T).logits_TV
        ops.choose_tokens(
            logits_TV, self.slots_T, rows.settings_S.temperature, rows.uniform_SC, rows.token_S, rows.position_S,
            self.told_SC, self.arrivals_TG,
        )  # fmt: skip

    def captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.rows.position_S.fill_(self.position)
        return graph

    def microseconds(self) -> float:
        graph = self.captured()
        for _ in range(3):
            graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / REPLAYS


def changed(module: ModuleType, name: str, value: Any, measure: Callable[[], float]) -> str:
    """What a step takes with a constant of the kernels changed, or why it does not run."""
    before = getattr(module, name)
    setattr(module, name, {**before, **value} if isinstance(value, dict) else value)
    try:
        return f"{measure():.1f} µs"
    except Exception as error:  # of Triton's compiler: tiles that do not fit
        return f"failed: {error}"[:120]
    finally:
        setattr(module, name, before)


def show_kernels(steps: Steps) -> None:
    """Each kernel's part of a step, one after another."""
    dependent_launch_triton.ALLOWED = False
    graph = steps.captured()
    dependent_launch_triton.ALLOWED = True
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:SHOWN]:
        if event.self_device_time_total:
            took, count = event.self_device_time_total / REPLAYS, event.count / REPLAYS
            print(f"    {took:8.1f} µs  {count:4.0f} × {event.key[:60]}", flush=True)


def show_layer(steps: Steps) -> None:
    """When the kernels of a layer in the middle begin and end, launched as the decoder does."""
    graph = steps.captured()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    result = profiler.profiler.kineto_results  # type: ignore[union-attr]
    found = sorted((event.start_ns(), event.duration_ns(), event.name()) for event in result.events())
    kernels = [event for event in found if event[1] and "Mem" not in event[2]]
    a_step = kernels[-(len(kernels) // 3) :]
    per_layer = len(a_step) // len(steps.weights.layers)
    middle = a_step[len(a_step) // 2 :][:per_layer]
    for start, took, name in middle:
        begin = 1e-3 * (start - middle[0][0])
        print(f"    from {begin:6.1f} to {begin + 1e-3 * took:6.1f} µs  {name[:60]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="800m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 64, 256])
    parser.add_argument("--position", type=int, default=600)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed")
    model = Transformer(load_shape(arguments.shape, "cuda", 0, 0).model).to("cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    store_in(model, torch.bfloat16)
    for rows in arguments.rows:
        steps = Steps(model, rows, arguments.position)
        print(f"{arguments.shape}, {rows} rows: {steps.microseconds():.1f}, {steps.microseconds():.1f} µs", flush=True)
        of_few = OF_FEW + (OF_ONE if rows == 1 else OF_SEVERAL)
        for module, name, value in of_few if rows <= experts_triton.PAIR_TOKENS else OF_MANY:
            print(f"  {name} {value}: {changed(module, name, value, steps.microseconds)}", flush=True)
        show_kernels(steps)
        show_layer(steps)


if __name__ == "__main__":
    main()
