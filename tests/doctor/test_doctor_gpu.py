"""GPUs as nvidia-smi and PyTorch tell of them, and rates beside a datasheet, without a GPU."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p828.config import load
from p828.doctor.gpu import _runs_on, check_gpus
from p828.doctor.model import check_model
from p828.doctor.rates import against

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
def test_without_a_gpu_a_small_model_is_fine_and_a_large_one_warned_of() -> None:
    quickstart, large = load("quickstart"), load("60m")
    asks = replace(quickstart, train=replace(quickstart.train, device="cuda"))
    found = {name: check_gpus(config) for name, config in
             {"none": None, "small": quickstart, "large": large, "asks": asks}.items()}  # fmt: skip
    statuses = {name: [check.status for check in checks] for name, checks in found.items()}
    assert statuses == {"none": ["ok"], "small": ["ok"], "large": ["warning"], "asks": ["failure"]}


@no_gpu
def test_a_gpu_that_pytorch_does_not_see_is_a_failure_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('NVIDIA H100 80GB HBM3')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = check_gpus(None)
    assert check.status == "failure"
    assert "NVIDIA H100 80GB HBM3" in check.text
    expected = "built for CPUs only" if torch.version.cuda is None else "driver"
    assert expected in check.remedy


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("sm_90", (9, 0), True), ("sm_80", (8, 9), True), ("sm_90", (8, 0), False), ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True), ("compute_90", (8, 0), False), ("sm_90a", (9, 0), True),
        ("sm_100", (10, 0), True), ("sm_120", (12, 0), True), ("sm_100", (9, 0), False), ("gfx90a", (9, 0), False),
    ],
)  # fmt: skip
def test_code_for_a_generation_runs_on_its_later_cards(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert _runs_on(arch, *capability) == runs


def test_a_rate_is_held_against_the_datasheet() -> None:
    assert against("it", "600", 600.0, 1000.0, 0.5, "cool it").status == "ok"
    slow = against("it", "400", 400.0, 1000.0, 0.5, "cool it")
    assert (slow.status, slow.remedy) == ("warning", "cool it")
    assert slow.text == "400, 40% of the datasheet; at least 50% is usual"
    assert against("it", "400", 400.0, None, 0.5, "cool it").status == "ok"


def test_a_model_that_the_cpu_computes_is_told_with_its_sizes() -> None:
    check = check_model(load("60m"), torch.device("cpu"))
    assert check.status == "ok"
    assert "60.8 M parameters" in check.text
    assert "float32" in check.text
