"""Training through DeepSpeed on GPUs: on one beside the plain engine, and on two beside one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from p828.runs import checkpoint, records
from runs import p828, write_text, write_toml

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 8
# bfloat16 arithmetic: a step's rounding, 2^-9 of each product, leads the two runs apart by some hundredths of a nat.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_text(path / "text")
    model = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 5, "head_dim": 16}
    train = {"device": "cuda", "steps": STEPS, "gradient_accumulation": 4}
    optimizer = {"learning_rate": 1e-3}  # at the tiny model's own rate, losses jump, and rounding moves the jumps
    return write_toml(
        path, model=model, train=train, optimizer=optimizer, evaluation={"every": 4}, checkpoint={"every": 4}
    )


def train(toml: Path, name: str, ranks: int, *flags: str) -> list[dict[str, object]]:
    """The records of a run, trained on this number of GPUs; on 0 by the plain engine."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks else ()
    engine = ("--engine", "deepspeed") if ranks else ()
    accumulation = ("--train.gradient-accumulation", str(4 // max(ranks, 1)))
    code, _, said = p828(
        "train", str(toml), "--name", name, *engine, *accumulation, *flags, cwd=toml.parent,
        launcher=(*launcher, "-m", "p828"),
    )  # fmt: skip
    assert code == 0, said[-4000:]
    return [line for line in records.read(toml.parent / "runs" / name / "metrics.jsonl") if line["kind"] == "step"]


@pytest.fixture(scope="module")
def plain(toml: Path) -> list[dict[str, object]]:
    return train(toml, "plain", 0, "--train.compile", "off")


def assert_near(steps: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert len(steps) == len(expected) == STEPS
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)
        assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_beside_the_plain_engine(
    cuda: torch.device, toml: Path, plain: list[dict[str, object]], stage: int
) -> None:
    compile_ = "on" if stage in (1, 3) else "off"  # compiled, stage 1 captures its micro-batches
    flags = ("--deepspeed.stage", str(stage), "--train.compile", compile_)
    assert_near(train(toml, f"stage{stage}", 1, *flags), plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_beside_one_and_resumed_on_one(
    cuda: torch.device, toml: Path, plain: list[dict[str, object]], stage: int
) -> None:
    name, flags = f"two{stage}", ("--deepspeed.stage", str(stage), "--train.compile", "on" if stage == 1 else "off")
    train(toml, name, 2, *flags, "--train.steps", str(STEPS // 2), "--schedule.kind", "constant")
    steps = train(toml, name, 1, *flags, "--schedule.kind", "constant")
    expected = train(toml, f"{name}-whole", 1, *flags, "--schedule.kind", "constant")
    assert_near(steps, expected)
    saved = checkpoint.load(toml.parent / "runs" / name / "checkpoints" / f"step_{STEPS // 2:08}")
    bias = saved.tensors["model"]["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU may be the rank's own")
def test_a_rank_without_a_gpu_says_so(toml: Path) -> None:
    rank = str(torch.cuda.device_count())
    environment = os.environ | {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": str(int(rank) + 1)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "p828", "train", str(toml), "--engine", "deepspeed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"p828: LOCAL_RANK = {rank}: ")
