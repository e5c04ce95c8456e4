"""Where a step's time goes: one profiled step, its kernels (on a CPU: operators) sorted into the model's parts."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

OTHER = "copies and other"
LONGEST = 15


class Part(NamedTuple):
    name: str
    scopes: str
    """Pattern of the operators, autograd functions and annotations from within which the work was started."""
    kernels: str
    """Pattern of the kernel's or operator's own name."""


# In this order: scopes of all parts first, since a matrix product says in its name neither that it is the head's nor
# that it is an expert's; then names. No match is OTHER.
PARTS = (
    Part("head and loss", r"CrossEntropy", r"^loss_|cross_entropy|nll_loss|log_?softmax|logsumexp"),
    Part("optimizer", r"^Optimizer\.step|_foreach", r"^adamw_|multi_tensor|[Ff]used_?[Aa]dam|_foreach"),
    Part("attention", r"[Aa]ttention", r"^attention_|^rope_|flash|fmha|sdpa|attention"),
    Part(
        "experts",
        r"[Pp]ermuteTokens|[Gg]rouped_?([Ll]inear|mm)|p828::(routed_experts|swiglu_down|sort_rows|router|choose)",
        r"^experts_|grouped|GroupProblemShape|[Rr]adix_?[Ss]ort|argsort|gatherTopK|topk",
    ),
    Part("embedding", r"[Ee]mbedding", r"^embedding_|embedding"),
    Part("dense projections", r"", r"gemm|nvjet|cutlass|cublas|splitK|^triton_tem|aten::(addmm|mm|bmm|linear|matmul)"),
    Part(OTHER, r"", r"Memcpy|Memset|copy_kernel|FillFunctor|CatArray|aten::(copy_|zero_|fill_|cat)"),
    Part(
        "norms and elementwise",
        r"",
        r"^triton_|^norm_|elementwise|reduce_kernel|aten::(\w*rms_norm\w*|mul|add|div|sub|neg|silu|sigmoid|sum|mean|pow|rsqrt"
        r"|exp|\w+_backward)_?$",
    ),
)


class Work(NamedTuple):
    """All runs of one kernel from one scope."""

    name: str
    scopes: tuple[str, ...]
    microseconds: float
    times: int


def classify(name: str, scopes: Iterable[str] = ()) -> str:
    """The part that a kernel belongs to, by where it was started from if that says so, else by its name."""
    scopes = tuple(scopes)
    for part in PARTS:
        if part.scopes and any(re.search(part.scopes, scope) for scope in scopes):
            return part.name
    return next((part.name for part in PARTS if re.search(part.kernels, name)), OTHER)


def break_down(
    run: Callable[[], None], step_seconds: float, micro_batches: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds a micro-batch of each part and of the longest kernels, from one profiled call of `run`.

    `step_seconds` is a step's time without the profiler, which slows the host but not a GPU's kernels: on a GPU, what
    exceeds theirs is when the GPU is idle. On a CPU the shares are of the profiled step.
    """
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            started = time.perf_counter()
            run()
            profiled_seconds = time.perf_counter() - started
        return summarise(cpu_work(list(profiler.events() or ())), profiled_seconds, micro_batches)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    found = summarise(gpu_work(list(profiler.events() or ())), step_seconds, micro_batches)
    found["parts"]["GPU idle"] = max(0.0, found["ms"] - sum(found["parts"].values()))
    return found


def summarise(work: Iterable[Work], step_seconds: float, micro_batches: int) -> dict[str, Any]:
    """`ms` of the whole, of each of the `parts` (longest first) and of the longest `kernels`, a micro-batch each."""
    parts = dict.fromkeys((part.name for part in PARTS), 0.0)
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for name, scopes, microseconds, times in work:
        part, ms = classify(name, scopes), microseconds / 1e3 / micro_batches
        parts[part] += ms
        kernels[name, part][0] += ms
        kernels[name, part][1] += times / micro_batches
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:LONGEST]
    return {
        "ms": step_seconds * 1e3 / micro_batches,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name, "part": part, "ms": ms, "times": times} for (name, part), (ms, times) in longest],
    }


def gpu_work(events: list[Any]) -> list[Work]:
    """Every kernel and copy once. Those that the profiler ties to an operator have its scopes, the others none."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            totals[event.name][0] += event.time_range.elapsed_us()
            totals[event.name][1] += 1
    work = []
    for event in events:
        for kernel in event.kernels if event.device_type.name == "CPU" else ():
            if kernel.name in totals:  # annotations have spans on the GPU too
                work.append(Work(kernel.name, scopes_of(event), kernel.duration, 1))
                totals[kernel.name][0] -= kernel.duration
                totals[kernel.name][1] -= 1
    rest = [Work(name, (), microseconds, int(count)) for name, (microseconds, count) in totals.items() if count > 0]
    return work + rest


def cpu_work(events: list[Any]) -> list[Work]:
    """Every operator's own time, that of the operators it calls left out."""
    return [
        Work(event.name, scopes_of(event), event.self_cpu_time_total, 1)
        for event in events
        if event.device_type.name == "CPU" and event.self_cpu_time_total > 0
    ]


def scopes_of(event: Any) -> tuple[str, ...]:
    scopes = []
    while event is not None:
        scopes.append(event.name)
        event = event.cpu_parent
    return tuple(scopes)
