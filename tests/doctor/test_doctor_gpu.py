"""GPUs as nvidia-smi and PyTorch tell of them, and rates beside a datasheet, without a GPU."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p828.config import Config, load, with_vocabulary
from p828.doctor.gpu import _runs_on, check_gpus, judged_memory, planned_bytes
from p828.doctor.model import check_model
from p828.doctor.rates import against
from p828.plan.peak import peak
from p828.plan.setup import sharded_setup
from p828.train import engine_choice

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


def test_memory_is_judged_by_what_the_run_is_planned_to_take() -> None:
    config, total = load("800m"), 80 * 10**9
    planned = planned_bytes(config, 1)
    assert planned is not None
    assert 10e9 < planned < 40e9

    def status(free: float, taken: float = 0.0, of: Config | None = config) -> str:
        return judged_memory(0, int(free), total, int(taken), of, 1).status

    assert status(total) == "ok"
    assert status(1.05 * planned) == "warning"
    assert status(0.99 * planned) == "failure"
    assert status(0.9 * total, 0.1 * total) == "warning"
    assert status(1.0, of=None) == "ok"


def test_partitions_take_less_of_each_gpu_and_float32_is_not_planned() -> None:
    config = load("800m")
    sharded = replace(config, engine="deepspeed", deepspeed=replace(config.deepspeed, stage=2))
    alone, eighth = planned_bytes(sharded, 1), planned_bytes(sharded, 8)
    assert alone is not None
    assert eighth is not None
    assert eighth < alone
    assert planned_bytes(replace(config, train=replace(config.train, dtype="float32")), 1) is None
    own = replace(config, engine="sharded", sharded=replace(config.sharded, stage=2))
    assert planned_bytes(own, 8) == engine_choice.planned_bytes(own, 2, 8) != eighth


def test_the_sharded_engine_is_judged_by_its_own_plan() -> None:
    config = replace(load("800m"), engine="sharded")
    planned = peak(with_vocabulary(config), sharded_setup(config, 1, 8), config.train.micro_batch_size).total
    assert planned_bytes(config, 8) == planned
    assert planned_bytes(replace(config, engine="deepspeed"), 8) != planned


def test_parameters_of_a_small_model_are_counted_in_thousands() -> None:
    """853,640, of which a token passes 657,032; as millions, the active ones of a smaller model would be 0.0."""
    assert "854 k parameters, 657 k active" in check_model(load("quickstart"), torch.device("cpu")).text
