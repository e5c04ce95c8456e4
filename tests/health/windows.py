"""Records of a run that exists in numbers only, for rules to look at."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from p828.config import ScheduleConfig
from p828.health.examine import examine
from p828.health.facts import Facts
from p828.health.finding import Finding
from p828.health.window import Window
from p828.runs.records import encoded

Record = dict[str, Any]
PARTS = ("embedding", "attention", "sinks", "router", "routed_experts", "shared_experts", "norms", "head")
STEPS = 200
TWO_RANKS = {"rank_memory_bytes": [10**9, 10**9]}
NUMBERS = dict.fromkeys(PARTS, 10_000.0)
FACTS = Facts(
    run="runs/made-up",
    steps=400,
    layers=2,
    experts=8,
    experts_per_token=2,
    vocab_size=300,
    active_parameters=50_000,
    numbers=NUMBERS,
    tokens_per_step=128,
    peak_rate=3e-3,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20),
    gradient_accumulation=2,
    evaluation_every=50,
)
"""Of a run in float32."""
CONFIG = """
name = "made-up"
model = { vocab_size = 300, num_hidden_layers = 2, n_routed_experts = 8, num_experts_per_tok = 2 }
optimizer = { learning_rate = 3e-3 }
schedule = { warmup_steps = 20 }
train = { steps = 400, gradient_accumulation = 2, dtype = "float32" }
"""


def facts(**changes: Any) -> Facts:
    return replace(FACTS, **changes)


def noise(step: int, size: float = 0.05) -> float:
    """The same numbers every time, without a trend: between -size and size."""
    return size * math.sin(12.9898 * step) * math.cos(78.233 * step)


def loss(step: int) -> float:
    """From ln 300 down to 2."""
    return 2 + (math.log(300) - 2) * math.exp(-(step - 1) / 60) + noise(step)


def step_record(step: int, of: Facts = FACTS) -> Record:
    """A healthy step."""
    rate = of.learning_rate(step) or 0.0
    record: Record = {
        "kind": "step",
        "step": step,
        "tokens": 128 * step,
        "targets": 128,
        "epoch": 0,
        "rows": f"{step * 2654435761 % 2**32:08x}",
        "loss": loss(step),
        "grad_norm": 1 + noise(step, 0.3),
        "lr": rate,
        "tokens_per_second": 10_000 + noise(step, 500),
        "mfu": None,
        "memory_bytes": 400_000_000,
        "seconds": 0.0128,
        "data_seconds": 1e-4,
        "max_token": 299,
        "balance": [0.97, 0.96],
        "min_share": [0.8, 0.7],
        "max_share": [1.3, 1.4],
        "starved": [0, 0],
        "load": [[32] * 8] * 2,
        "grad_norms": dict.fromkeys(PARTS, (1 + noise(step, 0.3)) / math.sqrt(len(PARTS))),
    }
    if step == 1 or step % 10 == 0:
        record |= {
            "weight_norms": dict.fromkeys(PARTS, 10.0),
            "update_ratios": dict.fromkeys(PARTS, 0.3 * rate * math.sqrt(10_000) / 10),
            "changed": dict.fromkeys(PARTS, 1.0),
            "router_entropy": [0.95, 0.96],
            "bias_max": [0.03, 0.04],
            "bias_load_correlation": [0.9, 0.8],
        }
    return record


def evaluation(step: int, value: float | None = None) -> Record:
    return {"kind": "eval", "step": step, "loss": loss(step) if value is None else value}


def probe(step: int, **numbers: float) -> Record:
    healthy = {
        "future_leak": 1e-6,
        "document_leak": 0.0,
        "row_leak": 1e-6,
        "batch_leak": 1e-6,
        "evaluation_difference": 0.0,
    }
    return {"kind": "probe", "step": step, **healthy, "loss_difference": 1e-5, "validation_overlap": 0.0, **numbers}


def event(name: str, step: int, text: str = "") -> Record:
    return {"kind": "event", "step": step, "event": name, "text": text}


RESUME = event("resume", 100, "resumed from step 100")


def healthy(steps: int = 200, of: Facts = FACTS) -> list[Record]:
    """Steps, with an evaluation and a probe every 50 of them."""
    records: list[Record] = [step_record(1, of), probe(1)]
    for step in range(2, steps + 1):
        records.append(step_record(step, of))
        if step % 50 == 0:
            records += [evaluation(step), probe(step)]
    return records


def changed(records: Iterable[Record], since: int, change: Callable[[Record], Record]) -> list[Record]:
    """The steps from `since` on with other numbers."""
    return [
        {**record, **change(record)} if record["kind"] == "step" and record["step"] >= since else record
        for record in records
    ]


def steps(change: Callable[[Record], Record], since: int = 1, of: Facts = FACTS) -> list[Record]:
    """Those of a healthy run of `STEPS` steps, of which a thing is changed from step `since` on."""
    return changed(healthy(STEPS, of), since, change)


def only(part: str, value: float, name: str) -> Callable[[Record], Record]:
    """The change of one part's number."""
    return lambda record: {name: {**record[name], part: value}} if name in record else {}


def window(records: Iterable[Record], of: Facts = FACTS) -> Window:
    found = Window(of)
    for record in records:
        found.add(record)
    return found


def found(records: Iterable[Record], of: Facts = FACTS) -> list[Finding]:
    return examine(window(records, of))


def rules(records: Iterable[Record], of: Facts = FACTS) -> list[str]:
    return [finding.rule for finding in found(records, of)]


def write_run(directory: Path, records: Iterable[Record]) -> Path:
    """A run's directory with these records and the configuration of `FACTS`, without the norms of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(CONFIG)
    kept = ({key: value for key, value in record.items() if key != "weight_norms"} for record in records)
    lines = (json.dumps(encoded(record), allow_nan=False) for record in kept)
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return directory
