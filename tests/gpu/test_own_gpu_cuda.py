"""Processes that each see one GPU, as SLURM starts them with --gpus-per-task=1."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.runs import records
from runs import p828, start, write_text, write_toml

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WITH_ONE_EACH = f'CUDA_VISIBLE_DEVICES=$LOCAL_RANK exec {sys.executable} -m p828 "$@"'
WITH_THE_SAME = f'CUDA_VISIBLE_DEVICES=0 exec {sys.executable} -m p828 "$@"'


def two_processes(line: str) -> tuple[str, ...]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return (*torchrun, "--no-python", "sh", "-c", line, "sh")


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_text(path / "text")
    return write_toml(path, train={"device": "cuda", "steps": 4, "deterministic": True, "compile": "off"})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine, stage", [("sharded", 2), ("deepspeed", 1), ("deepspeed", 3)])
def test_each_process_takes_the_only_gpu_it_sees(toml: Path, engine: str, stage: int) -> None:
    """The same training as where every process sees both GPUs."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    found: list[list[Any]] = []
    for name, line in (("own", WITH_ONE_EACH), ("both", f'exec {sys.executable} -m p828 "$@"')):
        run = f"{engine}-{stage}-{name}"
        flags = ("--engine", engine, f"--{engine}.stage", str(stage))
        code, _, said = p828("train", str(toml), "--name", run, *flags, cwd=toml.parent, launcher=two_processes(line))
        assert code == 0, said[-4000:]
        lines = records.read(toml.parent / "runs" / run / "metrics.jsonl")
        found.append([line["loss"] for line in lines if line["kind"] == "step"])
    assert len(found[0]) == 4
    # The same sums in the same order, but for reductions over ranks in an order that NCCL chooses: roundings of
    # bfloat16, 2^-9 of each product, over 4 steps.
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_two_processes_with_one_gpu_are_refused_in_a_line(toml: Path) -> None:
    process = start(
        "train", str(toml), "--name", "shared", "--engine", "sharded", cwd=toml.parent,
        launcher=two_processes(WITH_THE_SAME), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    _, said = process.communicate(timeout=180)
    lines = [line for line in said.splitlines() if line.startswith("p828: ")]
    assert len(lines) == 1, said[-4000:]
    assert lines[0].startswith("p828: ranks 0 and 1 have the same GPU of ")
    assert not (toml.parent / "runs" / "shared").exists()
