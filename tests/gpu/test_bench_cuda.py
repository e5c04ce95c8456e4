"""The bench on a GPU: kernels are tied to the parts they were started from, and a row comes out."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import record_function

from p828.bench.breakdown import break_down
from p828.model.loss import loss_and_gradients
from runs import p828, write_toml


def test_a_profiled_step(cuda: torch.device) -> None:
    hidden, weight = torch.randn(2, 4096, 512, device=cuda, dtype=torch.bfloat16)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    projection = torch.randn(512, 512, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    targets, scale = torch.randint(4096, (4096,), device=cuda), torch.ones((), device=cuda)

    def run() -> None:
        projected = F.linear(hidden, projection)
        with record_function("CrossEntropy"):
            _, gradient = loss_and_gradients(projected.detach(), weight, targets, scale, dweight)
        projected.backward(gradient)

    run()
    found = break_down(run, 1.0, 1, cuda)
    assert found["parts"]["head and loss"] > found["parts"]["dense projections"] > 0
    assert sum(found["parts"].values()) == pytest.approx(found["ms"])
    assert found["parts"]["GPU idle"] > 900  # a second was claimed for a step of milliseconds


def test_a_row(cuda: torch.device, tmp_path: Path) -> None:
    path = write_toml(tmp_path, train={"device": "cuda", "compile": "off"})
    code, out, err = p828(
        "bench", "train", "--shape", str(path), "--steps", "3", "--breakdown", "--json", "rows.json", cwd=tmp_path
    )
    assert code == 0, out + err
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["machine"]["matmul_flops"] > 1e12
    assert [row["framework"] for row in found["rows"]] == ["p828", "p828"]
    assert all(row["ms"] > 0 and row["peak_memory_bytes"] > 0 for row in found["rows"])
    assert "GPU idle" in out
