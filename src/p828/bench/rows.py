"""A measured row and the figures that follow from it."""

from dataclasses import asdict, dataclass
from typing import Any

from p828.config import Config
from p828.model.costs import training_flops


@dataclass(frozen=True)
class Row:
    shape: str
    routing: str
    system: str
    framework: str
    version: str
    ms: float
    """Of one micro-batch: forward, backward and its share of the update; the median."""
    ms_quartiles: tuple[float, float]
    """The middle half of the steps lies between these."""
    tokens_per_second: float
    tflops: float
    """10^12 model FLOPs a second."""
    mfu: float
    """Share of the matrix product's FLOP/s measured in the same run."""
    peak_memory_bytes: int
    """Of tensors on a GPU, of the process on a CPU."""
    peak_reserved_bytes: int
    """The same on a CPU; on a GPU what PyTorch has taken from it for tensors, gaps and CUDA graphs."""
    first_step_seconds: float
    """Of the first step in a fresh process, compilation included."""
    parameters: int
    weights: str
    """dtype of most parameters."""
    moments: str
    """dtype of most of the optimizer's state."""
    micro_batch_size: int
    sequence_length: int
    gradient_accumulation: int
    breakdown: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_row(
    shape: str, routing: str, system: str, framework: str, config: Config, measured: dict[str, Any], matmul_flops: float
) -> Row:
    """A row from what the measuring process found. The same work counts for every system: attention within documents,
    also where a system's attention goes beyond them."""
    accumulation = config.train.gradient_accumulation
    seconds = measured["step_seconds"] / accumulation
    low, high = measured["step_seconds_quartiles"]
    tokens = config.train.micro_batch_size * config.data.sequence_length
    flops = training_flops(config.model, tokens, measured["attended_pairs"]) / seconds
    return Row(
        shape=shape,
        routing=routing,
        system=system,
        framework=framework,
        version=measured["version"],
        ms=seconds * 1e3,
        ms_quartiles=(low * 1e3 / accumulation, high * 1e3 / accumulation),
        tokens_per_second=tokens / seconds,
        tflops=flops / 1e12,
        mfu=flops / matmul_flops,
        peak_memory_bytes=measured["peak_memory_bytes"],
        peak_reserved_bytes=measured["peak_reserved_bytes"],
        first_step_seconds=measured["first_step_seconds"],
        parameters=measured["parameters"],
        weights=measured["weights"],
        moments=measured["moments"],
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        gradient_accumulation=accumulation,
        breakdown=measured.get("breakdown"),
    )


def fastest(rows: list[Row]) -> Row | None:
    return max(rows, key=lambda row: row.tokens_per_second, default=None)
