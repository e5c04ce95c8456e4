"""Compare the memory that `p828 plan` predicts with what training takes.

usage: python benchmarks/planned_memory.py [--only NAME ...] [--out FILE] [--ranks 2] [--tiny]

Trains a few steps of eight configurations on made-up text, each in a process of its own, several at once where they
fit beside each other, and prints a row for each as it ends: the parts that are predicted, and predicted and measured
peaks, allocated (what tensors took at most) and reserved (what PyTorch took from the GPU). With `--ranks` two of them
are trained on so many GPUs at ZeRO stages 1 to 3, by the sharded engine and by DeepSpeed. `--tiny` trains small ones on
the CPU, which shows that the script runs and nothing else. Without a GPU there are predictions alone.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from scaling import Failed, run_within

from p828.bench.batches import random_batches
from p828.bench.step import rotate
from p828.bench.systems import load_shape
from p828.config import Config, from_dict, validate
from p828.config.values import changed, to_dict
from p828.distributed.group import ProcessGroup, joined
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.interface import Engine
from p828.engine.plain import PlainEngine
from p828.engine.sharded.engine import ShardedEngine
from p828.inference.evaluate import evaluate
from p828.plan.peak import peak
from p828.plan.setup import plain_setup, setup_of
from p828.system.device import peak_memory

STEPS, ACCUMULATION = 2, 2  # the second step captures both kinds of micro-batch
AT_ONCE = 6
ROW_SECONDS = 170
USED = 0.97  # of the GPU's memory, by all processes at once

# A preset and what is changed of it.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "60m": ("60m", {}),
    "odd heads, tied": (
        "800m",
        {
            "model.vocab_size": 50257, "model.tie_word_embeddings": True, "model.hidden_size": 776,
            "model.num_hidden_layers": 5, "model.num_attention_heads": 6, "model.num_key_value_heads": 3,
            "model.head_dim": 88, "model.n_routed_experts": 13, "model.num_experts_per_tok": 3,
            "model.moe_intermediate_size": 1000, "model.n_shared_experts": 0, "model.use_qk_norm": True,
            "data.sequence_length": 1536, "train.micro_batch_size": 7,
        },
    ),
    "many experts, losses": (
        "800m",
        {
            "model.vocab_size": 131072, "model.hidden_size": 640, "model.num_hidden_layers": 7,
            "model.num_attention_heads": 10, "model.num_key_value_heads": 2, "model.head_dim": 96,
            "model.n_routed_experts": 96, "model.num_experts_per_tok": 8, "model.moe_intermediate_size": 136,
            "model.n_shared_experts": 2, "model.hidden_act": "swiglu_of_product", "model.n_group": 8,
            "model.topk_group": 4, "model.scoring_func": "softmax", "model.max_position_embeddings": 4096,
            "data.sequence_length": 4096, "train.micro_batch_size": 3, "balance.sequence_loss_weight": 1e-3,
            "balance.z_loss_weight": 1e-4,
        },
    ),
    "800m": ("800m", {}),
    "fine-grained": ("fine-grained", {}),
    "800m, recomputed, 24 rows": (
        "800m",
        {"train.gradient_checkpointing": True, "train.micro_batch_size": 24},
    ),
    "planned": ("planned", {"train.micro_batch_size": 4}),
    "800m, 60 rows": ("800m", {"train.micro_batch_size": 60}),
}  # fmt: skip
ON_RANKS = ("800m", "odd heads, tied")
SYSTEMS = [(engine, stage) for engine in ("sharded", "deepspeed") for stage in (1, 2, 3)]
TINY = {
    "model.hidden_size": 64, "model.moe_intermediate_size": 24, "model.num_hidden_layers": 2, "model.vocab_size": 509,
    "data.sequence_length": 64, "train.micro_batch_size": 2,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGURATIONS)
    parser.add_argument("--out", type=Path, help="a row as JSON on a line of this file, too")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker.read_text()), given.worker.with_suffix(".result"))
        return
    names = given.only or (CONFIGURATIONS if given.ranks == 1 else ON_RANKS)
    systems = SYSTEMS if given.ranks > 1 else [("plain", None)]
    jobs = [make_job(name, *system, given.ranks, given.tiny) for system in systems for name in names]
    for number, job in enumerate(jobs):
        job["number"] = number
    started = time.monotonic()
    is_measured = given.tiny or torch.cuda.device_count() >= given.ranks
    if not is_measured:
        print(f"{given.ranks} GPUs are not here: predictions alone", flush=True)
    print(f"torch {torch.__version__}, {machine()}", flush=True)
    run_all(jobs, is_measured, given.out)
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def make_job(name: str, engine: str, stage: int | None, ranks: int, is_tiny: bool) -> dict[str, Any]:
    """What a process measures, and the prediction."""
    base, changes = CONFIGURATIONS[name]
    config = load_shape(base, "cpu" if is_tiny else "cuda", 0, ACCUMULATION)
    values = {**changes, **(TINY if is_tiny else {}), "name": "planned-memory"}
    if stage is not None:
        values |= {"engine": engine, f"{engine}.stage": stage}
    config = changed(config, values)
    validate(config)
    setup = plain_setup(config) if stage is None else setup_of(config, stage, ranks)
    memory = peak(config, setup, config.train.micro_batch_size)
    return {
        "name": name if stage is None else f"{name}, {engine} {stage} on {ranks}",
        "config": to_dict(config),
        "ranks": ranks,
        "predicted": {
            **dataclasses.asdict(memory),
            "allocated": memory.allocated,
            "reserved": memory.reserved,
            "needed": memory.total - (memory.evaluation if ranks > 1 else 0),
        },
    }


def run_all(jobs: list[dict[str, Any]], is_measured: bool, out: Path | None) -> None:
    """Several at once while the GPU has room for what is predicted of them, and rows as they end."""
    room = USED * torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else float("inf")
    waiting, running = list(jobs), dict[Future[dict[str, Any]], dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="p828-planned-") as directory, ThreadPoolExecutor(AT_ONCE) as pool:
        while waiting or running:
            taken = sum(job["predicted"]["needed"] for job in running.values())
            for job in list(waiting):
                needs = job["predicted"]["needed"]
                if not running or (len(running) < AT_ONCE and taken + needs <= room):
                    waiting.remove(job)
                    for other in running.values():
                        other["shares_gpu"] = job["shares_gpu"] = True
                    running[pool.submit(measured, job, is_measured, Path(directory))] = job
                    taken += needs
            for future in [future for future in running if future.done()]:
                report({**running.pop(future), **future.result()}, out)
            time.sleep(0.1)


def measured(job: dict[str, Any], is_measured: bool, directory: Path) -> dict[str, Any]:
    if not is_measured:
        return {}
    path = directory / f"{job['number']}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, __file__, "--worker", str(path)]
    if job["ranks"] > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job["ranks"])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"), "TRITON_CACHE_DIR": str(directory / "triton")}
    try:
        run_within(ROW_SECONDS, [command], [{**os.environ, "OMP_NUM_THREADS": "1", **caches}])
    except Failed as error:
        return {"failed": str(error)}
    return {"measured": json.loads(path.with_suffix(".result").read_text())}


def work(job: dict[str, Any], result: Path) -> None:
    """Train the steps, and write down the most that any rank took."""
    config = from_dict(job["config"], "job")
    started = time.monotonic()
    with joined(config) as ranks:
        engine = build(config, ranks)
        is_gpu = engine.device.type == "cuda"
        found = {"state": torch.cuda.memory_allocated() if is_gpu else 0, "making": peak_memory(engine.device)}
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        batches = rotate(random_batches(config, engine.device))
        for step in range(STEPS):
            own = [next(batches) for _ in range(ACCUMULATION)]
            targets = int(ranks.all_reduce([sum(batch.num_targets for batch in own)])[0])
            for number, batch in enumerate(own):
                engine.forward_backward(batch, targets)
                if step == number == 0:
                    found["first_micro_batch"] = peak_memory(engine.device)
            engine.step(config.optimizer.learning_rate)
        found["allocated"] = max(peak_memory(engine.device), found["making"])
        found["reserved"] = torch.cuda.max_memory_reserved() if is_gpu else 0
        found["still_reserved"] = torch.cuda.memory_reserved() if is_gpu else 0
        if ranks.size == 1:
            with engine.model_for_evaluation() as model:
                evaluate(model, [next(batches)], engine.dtype)
            found["reserved_with_evaluation"] = torch.cuda.memory_reserved() if is_gpu else 0
        free, total = torch.cuda.mem_get_info() if is_gpu else (0, 0)
        found["device"] = total - free
        found["seconds"] = time.monotonic() - started
        most = [int(max(values)) for values in zip(*ranks.all_gather([*found.values()]), strict=True)]
        if ranks.is_first:
            result.write_text(json.dumps(dict(zip(found, most, strict=True))))


def build(config: Config, ranks: ProcessGroup) -> Engine:
    if config.engine == "deepspeed":
        return DeepSpeedEngine(config, ranks, check_deepspeed(config, ranks))
    return ShardedEngine(config, ranks) if config.engine == "sharded" else PlainEngine(config)


def report(row: dict[str, Any], out: Path | None) -> None:
    """A line of the parts that are predicted, and one of the peaks."""
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    predicted = row["predicted"]
    parts = {name: value for name, value in predicted.items() if isinstance(value, int) and value}
    print(f"\n{row['name']}: {predicted['moment']}")
    print("  predicted GB: " + ", ".join(f"{name} {value / 1e9:.3f}" for name, value in parts.items()))
    if "failed" in row:
        print("  failed: " + row["failed"].replace("\n", "\n    "), flush=True)
    if "measured" in row:
        found = row["measured"]
        if row.get("shares_gpu"):
            del found["device"]  # other processes' memory is in it
        print(
            "  measured GB: " + ", ".join(f"{name} {value / 1e9:.3f}" for name, value in found.items() if value > 1e4)
        )
        for kind in ("allocated", "reserved"):
            if found[kind]:
                error = predicted[kind] / found[kind] - 1
                print(f"  {kind}: {predicted[kind] / 1e9:.2f} / {found[kind] / 1e9:.2f} GB: {error:+.1%}")
        print(f"  {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
