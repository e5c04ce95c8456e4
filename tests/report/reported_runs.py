"""Runs of made-up records for reports."""

import json
import math
from pathlib import Path
from typing import Any

STEPS = 6000  # more than a page shows at once
FINDING = {
    "kind": "finding", "step": STEPS, "since": STEPS // 2, "rule": "spike", "severity": "warning",
    "evidence": "the loss rose <img src=x onerror=alert(1)></script>", "cause": "odd data", "remedy": "look at it",
    "reference": "none",
}  # fmt: skip


def step_record(step: int) -> dict[str, Any]:
    """With a loss and a norm that say which step it is; the loss has a peak in the middle of the run."""
    loss = 2 + math.sin(step) / 4 + (5 if step == STEPS // 2 else 0)
    record = {
        "kind": "step", "step": step, "tokens": 100 * step, "loss": loss, "grad_norm": 1 + step / STEPS, "lr": 1e-3,
        "tokens_per_second": 200.0, "seconds": 0.5, "memory_bytes": 10**9, "balance": [0.5, 1.0], "max_share": [1.5, 1],
    }  # fmt: skip
    if step % 10 == 0:
        record |= {"load": [[10, 30, 0, 40], [20, 20, 20, 20]], "grad_norms": {"router": 0.1, "head": 0.2}}
    return record


def write_run(path: Path, steps: int = STEPS, config: str = "[train]\nsteps = 6000\n") -> Path:
    path.mkdir(parents=True)
    records = [step_record(step) for step in range(1, steps + 1)]
    records.append({"kind": "eval", "step": steps, "loss": 2.5})
    records.append({"kind": "sample", "step": steps, "samples": [["Once", " upon </script><b>"]]})
    records.append(FINDING)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "config.toml").write_text(config)
    return path
