"""The sharded engine on GPUs, its phases captured: on one beside the plain engine, and on two beside one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from p828.runs import records
from runs import p828, start, wait_for_step, write_text, write_toml

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 8
# bfloat16 arithmetic: a step's rounding, 2^-9 of each product, leads the two runs apart by some hundredths of a nat.
TOLERANCE = 0.05
CONSTANT = ("--schedule.kind", "constant")
FLOAT32 = ("--train.dtype", "float32", "--train.compile", "off", "--evaluation.temperature", "0")
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
# Each GPU, or each pair of them, is a host of its own, as far as the launcher's variables say.
HOSTS = """
import os, sys
of_a_host = int(sys.argv[2])
host, rank = divmod(int(os.environ["RANK"]), of_a_host)
visible = ",".join(str(host * of_a_host + number) for number in range(of_a_host))
os.environ.update(CUDA_VISIBLE_DEVICES=visible, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(of_a_host))

import dataclasses, json
from p828.bench.batches import random_batches
from p828.config import ShardedConfig, load, with_vocabulary
from p828.distributed.group import joined
from p828.engine.sharded.engine import ShardedEngine

config = dataclasses.replace(with_vocabulary(load(sys.argv[1])), engine="sharded")
found = []
with joined(config) as ranks:
    for stage in (1, 2, 3):
        for within in ("all", "host"):
            sharded = ShardedConfig(stage=stage, shard_within=within)
            engine = ShardedEngine(dataclasses.replace(config, sharded=sharded), ranks)
            seed = dataclasses.replace(config.train, seed=config.train.seed + ranks.rank)
            batches = random_batches(dataclasses.replace(config, train=seed), engine.device)
            losses = []
            for step in range(6):
                own = [batches[(step + number) % 4] for number in range(config.train.gradient_accumulation)]
                targets = sum(number for (number,) in ranks.all_gather([sum(one.num_targets for one in own)]))
                for batch in own:
                    engine.forward_backward(batch, targets)
                losses.append(engine.step(1e-3).loss)
            found.append({"shards": engine.mesh.shards, "replicas": engine.mesh.replicas, "losses": losses})
    if ranks.is_first:
        print(json.dumps(found))
"""
COPIES = """
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from p828.config import ShardedConfig, load
from p828.distributed.group import joined
from p828.engine.sharded.collectives import start_exchange, start_gather
from p828.engine.sharded.mesh import mesh_of
from p828.engine.sharded.registered import RegisteredMemory
import dataclasses

config = dataclasses.replace(load(sys.argv[1]), engine="sharded")
with joined(config) as ranks:
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    mesh = mesh_of(ShardedConfig(), ranks)
    for _ in range(2):  # engines may come one after another
        memory = RegisteredMemory(mesh, device, ranks)
        with memory.allocating():
            flat, sent, received = (torch.zeros(mesh.shards * 64 * 1001, device=device) for _ in range(3))
            shard = torch.zeros(64 * 1001, device=device)
        memory.register()
        for turn in range(3):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                shard.copy_(torch.arange(len(shard), device=device) + 10 * mesh.shard + turn)
                start_gather(flat, shard, mesh).wait()
                sent.copy_(torch.arange(len(sent), device=device) + 10 * mesh.shard + turn)
                start_exchange(received, sent, mesh).wait()
                torch.cuda.synchronize()
            for rank in range(mesh.shards):
                own = torch.arange(len(shard), device=device) + 10 * rank + turn
                assert torch.equal(flat.chunk(mesh.shards)[rank], own)
                assert torch.equal(received.chunk(mesh.shards)[rank], own + len(shard) * mesh.shard)
        found.append([event.name() for event in profiler.profiler.kineto_results.events()])
        del memory, flat, sent, received, shard
    if ranks.is_first:
        print(json.dumps({"nccl": torch.cuda.nccl.version(), "names": found}))
"""
SAMPLER = """
import dataclasses, json, sys
import torch
from p828.config import ShardedConfig, load, with_vocabulary
from p828.distributed.group import joined
from p828.engine.plain import PlainEngine
from p828.engine.sharded.engine import ShardedEngine
from p828.inference.decode.decoder import Decoder
from p828.inference.evaluate import evaluation_mode, uncompiled
from p828.inference.sampling_config import SamplingConfig

def continued(model, dtype, steps):
    with evaluation_mode(model), uncompiled(model):
        decoder = Decoder(model, 300, 0, dtype, slots=3, prefill_tokens=16)
        prompts = [], [3, 1, 4], list(range(40))
        sampling = SamplingConfig(temperature=0.8, max_new_tokens=8)
        sequences = [decoder.admit(prompt, sampling, seed) for seed, prompt in enumerate(prompts)]
        found = type(decoder._steps).__name__
        while decoder.running:
            decoder.step()
    assert found == steps, found
    return [list(sequence.ids) for sequence in sequences]

config = load(sys.argv[1])
model = dataclasses.replace(config.model, hidden_size=256, num_hidden_layers=12, moe_intermediate_size=512)
config = dataclasses.replace(with_vocabulary(config), model=dataclasses.replace(model, vocab_size=300))
config = dataclasses.replace(config, engine="sharded", sharded=ShardedConfig(stage=3))
with joined(config) as ranks:
    engine = ShardedEngine(config, ranks)
    units = [unit.length * 2 for unit in engine.units]
    found = {"layer": units[1], "whole": sum(units), "tokens": []}
    for _ in range(2):  # in the first turn libraries make room for themselves, which they keep
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with engine.model_for_any_passes() as sampled:
            if ranks.is_first:
                found["tokens"] = continued(sampled, engine.dtype, "PlainSteps")
        torch.cuda.synchronize()
    found["peaks"] = ranks.all_gather([torch.cuda.max_memory_allocated() - before])
    if ranks.is_first:
        plain = PlainEngine(dataclasses.replace(config, engine="plain"))
        plain.model.weights_stay = False  # the same code, which reads weights where they are used
        found["expected"] = continued(plain.model, plain.dtype, "PlainSteps")
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


def torchrun(ranks: int) -> tuple[str, ...]:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def train(toml: Path, name: str, stage: int, ranks: int, *flags: str, kind: str = "step") -> list[dict[str, Any]]:
    """The records of a run on this number of GPUs; at stage 0 by the plain engine."""
    launcher = torchrun(ranks) if stage else ()
    engine = ("--engine", "sharded", "--sharded.stage", str(stage)) if stage else ()
    code, _, said = p828(
        "train", str(toml), "--name", name, *engine, "--train.gradient-accumulation", str(4 // ranks), *flags,
        cwd=toml.parent, launcher=(*launcher, "-m", "p828"),
    )  # fmt: skip
    assert code == 0, said[-4000:]
    return records_of(toml, name, kind)


def records_of(toml: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in records.read(toml.parent / "runs" / name / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def plain(toml: Path) -> list[dict[str, Any]]:
    return train(toml, "plain", 0, 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_the_plain_engine(
    cuda: torch.device, toml: Path, plain: list[dict[str, Any]], stage: int, ranks: int
) -> None:
    name = f"stage{stage}-{ranks}"
    assert_near(train(toml, name, stage, ranks), plain)
    evaluations = records_of(toml, name, "eval")
    for ours, theirs in zip(evaluations, records_of(toml, "plain", "eval"), strict=True):
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
    samples = [line["step"] for line in records_of(toml, name, "sample")]
    assert samples == [line["step"] for line in evaluations]
    assert len(samples) > 1


def assert_near(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(steps) == len(expected) == STEPS
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)
        assert ours["tokens"] == theirs["tokens"]


@pytest.fixture(scope="module")
def constant(toml: Path) -> list[dict[str, Any]]:
    return train(toml, "constant", 0, 1, *CONSTANT)


@pytest.mark.parametrize("before, after", [((3, 1), (2, 1)), ((1, 2), (3, 1)), ((3, 1), (1, 2)), ((2, 2), (0, 1))])
def test_resumed_at_another_stage_and_number_of_gpus(
    cuda: torch.device, toml: Path, constant: list[dict[str, Any]], before: tuple[int, int], after: tuple[int, int]
) -> None:
    name = "-".join(map(str, ("resumed", *before, *after)))
    torchrun(after[1])
    train(toml, name, *before, *CONSTANT, "--train.steps", str(STEPS // 2))
    assert_near(train(toml, name, *after, *CONSTANT), constant)


@pytest.fixture(scope="module")
def float32(toml: Path) -> Path:
    train(toml, "float32", 0, 1, *FLOAT32)
    return toml


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_float32_samples_are_those_of_the_plain_engine(
    cuda: torch.device, float32: Path, stage: int, ranks: int
) -> None:
    name = f"float32-{stage}-{ranks}"
    found = train(float32, name, stage, ranks, *FLOAT32, kind="sample")
    assert [line["samples"] for line in found] == [line["samples"] for line in records_of(float32, "float32", "sample")]
    losses = [[line["loss"] for line in records_of(float32, run, "eval")] for run in (name, "float32")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_at_stage_3_hold_no_whole_model(cuda: torch.device, toml: Path, ranks: int) -> None:
    script = toml.parent / "sampler.py"
    script.write_text(SAMPLER)
    command = [sys.executable, *torchrun(ranks), str(script), str(toml)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=toml.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == found["expected"]
    assert [len(tokens) for tokens in found["tokens"]] == [9, 11, 48]
    assert found["whole"] > 10 * found["layer"]
    assert all(peak < 2 * found["layer"] for (peak,) in found["peaks"]), found


@pytest.mark.parametrize("of_a_host", [1, 2])
def test_sharded_within_hosts_as_over_all(cuda: torch.device, toml: Path, of_a_host: int) -> None:
    """Two hosts of one and of two GPUs: the same losses. Sums in another order move single roundings to bfloat16."""
    script = toml.parent / "hosts.py"
    script.write_text(HOSTS)
    command = [sys.executable, *torchrun(2 * of_a_host), str(script), str(toml), str(of_a_host)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=toml.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for over_all, within in zip(found[::2], found[1::2], strict=True):
        assert (over_all["shards"], over_all["replicas"]) == (2 * of_a_host, 1)
        assert (within["shards"], within["replicas"]) == (of_a_host, 2)
        assert within["losses"] == pytest.approx(over_all["losses"], abs=1e-2)


@pytest.mark.parametrize("policy", ["0", "2"])
def test_gathered_and_exchanged_by_kernels_or_by_copy_engines(cuda: torch.device, toml: Path, policy: str) -> None:
    """The script compares what came."""
    script = toml.parent / "copies.py"
    script.write_text(COPIES)
    command = [sys.executable, *torchrun(2), str(script), str(toml)]
    environment = {**os.environ, "NCCL_CTA_POLICY": policy}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=toml.parent, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    has_copy_engines = policy == "2" and tuple(found["nccl"]) >= (2, 28)
    for names in found["names"]:
        assert any("PtoP" in name for name in names) == has_copy_engines
        assert any("nccl" in name.lower() for name in names) != has_copy_engines


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_lost_rank_ends_the_other(cuda: torch.device, toml: Path, is_killed: bool) -> None:
    """Also while the other one's copy engines wait for it: a rank that is killed, and one that hangs."""
    name = f"lost-{is_killed}"
    stage = ("--engine", "sharded", "--sharded.stage", "3", "--sharded.timeout-seconds", "40")
    process = start(
        "train", str(toml), "--name", name, *stage, "--train.steps", "100000", "--train.compile", "off",
        cwd=toml.parent, launcher=(*torchrun(2), "-m", "p828"),
    )  # fmt: skip
    wait_for_step(process, 1)
    first, second = sorted(psutil.Process(process.pid).children(), key=lambda worker: worker.environ()["RANK"])
    if is_killed:
        second.kill()
    else:
        second.suspend()
    psutil.wait_procs([first], timeout=120)
    assert not first.is_running()
    if not is_killed:
        second.kill()  # a launcher waits half a minute for one that hangs
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("rank 1 (" in said) if is_killed else ("p828: no progress for 40 s" in said), said[-4000:]


def test_the_stages_are_one_arithmetic(cuda: torch.device, toml: Path) -> None:
    """Their sums are float32 at every stage, so that losses differ by the order of sums alone."""
    command = [sys.executable, "-c", WORKER, str(toml)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=toml.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = json.loads(done.stdout)
    for losses in others:
        assert losses == pytest.approx(first, abs=1e-3)
