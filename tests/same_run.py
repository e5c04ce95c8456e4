"""Whether two runs are the same, for the tests that do something to one of them."""

import json
from pathlib import Path

import torch

from p828.runs import checkpoint, records

KEPT = ("loss", "grad_norm", "lr", "tokens", "load", "balance", "perplexity")


def final_state(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(run / "checkpoints" / f"step_{step:08}")


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """The same weights, optimizer, bias, random states, data position and records."""
    ours, theirs = final_state(first, step), final_state(second, step)
    for part in ("model", "optimizer", "random"):
        assert ours.tensors[part].keys() == theirs.tensors[part].keys()
        for name, tensor in ours.tensors[part].items():
            assert torch.equal(tensor, theirs.tensors[part][name]), f"{part}: {name}"
    assert ours.state["progress"] == theirs.state["progress"]
    assert ours.state["data"] == theirs.state["data"]
    assert comparable_records(first) == comparable_records(second)


def comparable_records(run: Path) -> list[tuple[object, ...]]:
    """Everything recorded but times, memory and events."""
    lines = [
        line for line in records.read(run / "metrics.jsonl") if line["kind"] in ("step", "eval", "tasks", "sample")
    ]
    return [
        (line["kind"], line["step"], json.dumps({k: v for k, v in line.items() if k in KEPT or line["kind"] != "step"}))
        for line in lines
    ]
