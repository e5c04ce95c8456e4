"""A measured row and the figures that follow from it."""

from dataclasses import asdict, dataclass
from typing import Any

from p828.bench.generation.step_bytes import expected_experts, step_bytes
from p828.bench.generation.workload import Item
from p828.config import ModelConfig

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StepRow:
    """Steps of a batch."""

    shape: str
    system: str
    framework: str
    weights: str
    """dtype of most parameters."""
    batch: int
    ms: float
    """Of one step, which gives every sequence a token; the median of the runs."""
    ms_range: tuple[float, float]
    """The fastest and the slowest run."""
    tokens_per_second: float
    """Of all sequences, each taking its likeliest token."""
    step_bytes: float
    """What the step must read, if routing is even."""
    memory_share: float
    """Those bytes in that time, as a share of the rate of memory."""
    cached_tokens: float
    """Of a sequence, in the mean."""
    sampled_tokens_per_second: float | None
    """The same with tokens drawn at a temperature and from a nucleus; p828 only."""
    expected_experts: float
    """Routed experts a layer that a step goes through, if routing is even."""
    distinct_experts: float | None
    """Those that were gone through; p828 only."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class FirstTokenRow:
    shape: str
    system: str
    framework: str
    prompt_length: int
    ms: float
    """From the prompt to the first token after it."""


@dataclass(frozen=True)
class RecomputeRow:
    shape: str
    system: str
    framework: str
    context: int
    step_ms: float
    """Of a step with the cache."""
    forward_ms: float
    """Of the training forward over the whole context and one more."""


Row = StepRow | FirstTokenRow | RecomputeRow


def to_dict(row: Row) -> dict[str, Any]:
    kinds = {StepRow: "steps", FirstTokenRow: "first token", RecomputeRow: "recompute"}
    return {"kind": kinds[type(row)], **asdict(row)}


def make_row(
    shape: str, system: str, framework: str, model: ModelConfig, dtype: str, measured: dict[str, Any], rate: float
) -> Row:
    """A row from what the measuring process found. `rate` is memory's, in bytes a second."""
    item = Item(**measured["item"])
    if item.first_token:
        return FirstTokenRow(shape, system, framework, item.first_token, 1e3 * measured["seconds"])
    if item.recompute:
        step, forward = measured["step_seconds"], measured["forward_seconds"]
        return RecomputeRow(shape, system, framework, item.recompute, 1e3 * step, 1e3 * forward)
    seconds, cached = measured["seconds"], measured["cached_tokens"]
    read = step_bytes(model, item.batch, cached, ITEMSIZES[dtype])
    low, high = measured["seconds_range"]
    sampled = measured.get("sampled_seconds")
    return StepRow(
        shape=shape,
        system=system,
        framework=framework,
        weights=dtype,
        batch=item.batch,
        ms=1e3 * seconds,
        ms_range=(1e3 * low, 1e3 * high),
        tokens_per_second=item.batch / seconds,
        step_bytes=read,
        memory_share=read / seconds / rate,
        cached_tokens=cached,
        sampled_tokens_per_second=None if sampled is None else item.batch / sampled,
        expected_experts=expected_experts(model, item.batch),
        distinct_experts=measured.get("distinct_experts"),
        peak_memory_bytes=measured["peak_memory_bytes"],
    )


def best_peer(rows: list[Row], row: Row) -> float | None:
    """How many times as fast as the fastest peer's row of the same shape and kind this one is; None without one."""
    asked = _asked(row)
    peers = [other for other in rows if other.framework != row.framework and _asked(other) == asked]
    if isinstance(row, RecomputeRow):
        return None
    return min((other.ms / row.ms for other in peers if not isinstance(other, RecomputeRow)), default=None)


def _asked(row: Row) -> tuple[str, type[Row], int]:
    """What two rows have in common that may be compared."""
    if isinstance(row, StepRow):
        return row.shape, StepRow, row.batch
    return row.shape, type(row), row.prompt_length if isinstance(row, FirstTokenRow) else row.context
