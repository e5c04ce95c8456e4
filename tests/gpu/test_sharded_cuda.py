"""The sharded engine on GPUs, its phases captured: on one beside the plain engine, and on two beside one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.runs import records
from runs import p828, write_text, write_toml

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 8
# bfloat16 arithmetic: a step's rounding, 2^-9 of each product, leads the two runs apart by some hundredths of a nat.
TOLERANCE = 0.05
WORKER = """
import dataclasses, json, sys
from p828.bench.batches import random_batches
from p828.config import ShardedConfig, load, with_vocabulary
from p828.distributed.group import joined
from p828.engine.sharded.engine import ShardedEngine

config = dataclasses.replace(with_vocabulary(load(sys.argv[1])), engine="sharded")
found = []
with joined(config) as ranks:
    for stage in (1, 2, 3):
        engine = ShardedEngine(dataclasses.replace(config, sharded=ShardedConfig(stage=stage)), ranks)
        batches, losses = random_batches(config, engine.device), []
        for step in range(6):
            own = [batches[(step + number) % 4] for number in range(config.train.gradient_accumulation)]
            for batch in own:
                engine.forward_backward(batch, sum(one.num_targets for one in own))
            losses.append(engine.step(1e-3).loss)
        found.append(losses)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_text(path / "text")
    model = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 5, "head_dim": 16}
    train = {"device": "cuda", "steps": STEPS, "gradient_accumulation": 4, "compile": "on"}
    optimizer = {"learning_rate": 1e-3}  # at the tiny model's own rate, losses jump, and rounding moves the jumps
    return write_toml(
        path, model=model, train=train, optimizer=optimizer, evaluation={"every": 4}, checkpoint={"every": 4}
    )


def train(toml: Path, name: str, stage: int, ranks: int) -> list[dict[str, Any]]:
    """The steps of a run on this number of GPUs; at stage 0 by the plain engine."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if stage else ()
    engine = ("--engine", "sharded", "--sharded.stage", str(stage)) if stage else ()
    code, _, said = p828(
        "train", str(toml), "--name", name, *engine, "--train.gradient-accumulation", str(4 // ranks),
        cwd=toml.parent, launcher=(*launcher, "-m", "p828"),
    )  # fmt: skip
    assert code == 0, said[-4000:]
    return [line for line in records.read(toml.parent / "runs" / name / "metrics.jsonl") if line["kind"] == "step"]


@pytest.fixture(scope="module")
def plain(toml: Path) -> list[dict[str, Any]]:
    return train(toml, "plain", 0, 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_the_plain_engine(
    cuda: torch.device, toml: Path, plain: list[dict[str, Any]], stage: int, ranks: int
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    steps = train(toml, f"stage{stage}-{ranks}", stage, ranks)
    assert len(steps) == len(plain) == STEPS
    for ours, theirs in zip(steps, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)
        assert ours["tokens"] == theirs["tokens"]


def test_the_stages_are_one_arithmetic(cuda: torch.device, toml: Path) -> None:
    """Their sums are float32 at every stage, so that losses differ by the order of sums alone."""
    command = [sys.executable, "-c", WORKER, str(toml)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=toml.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = json.loads(done.stdout)
    for losses in others:
        assert losses == pytest.approx(first, abs=1e-3)
