"""Time a step on two simulated hosts with a slow link between them: sharded over all ranks, and within each host.

usage: python benchmarks/two_hosts.py [--megabits 100] [--stages 1 2 3] [--gradient-accumulation 4] [--steps 3]
           [--ranks 2] [--hidden 128] [--layers 4] [--json FILE]

As root on Linux (`simulated_hosts.py`); `--ranks` is of each host, on CPUs in float32. A row has a step's time, the
time that the link takes for what it carries, and the bytes that a host sends over it in a step, by the interface's
counter, for each parameter.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from simulated_hosts import LINK, hosts_with_link, obstacle, run_on_nodes

from p828.bench.batches import random_batches
from p828.bench.step import rotate
from p828.config import Config, ShardedConfig, from_dict
from p828.config.values import to_dict
from p828.distributed.group import joined
from p828.engine.sharded.engine import ShardedEngine
from p828.model.costs import count_parameters

WARM_UP, WITHIN = 1, 900
FLOAT32 = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, default=100)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--gradient-accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker.read_text()), given.worker.with_suffix(".result"))
        return
    if reason := obstacle():
        sys.exit(f"hosts cannot be simulated: {reason}")
    config = shape(given.hidden, given.layers, given.gradient_accumulation)
    parameters = count_parameters(config.model).total
    print(
        f"{parameters / 1e6:.1f} M parameters in float32, 2 hosts of {given.ranks} ranks, {given.megabits:g} Mbit/s "
        f"between them, {given.gradient_accumulation} micro-batches a step\n\n"
        "| stage | shard_within | s a step | of it, the link's | bytes over the link, a parameter |\n"
        "|---|---|---|---|---|"
    )
    results = []
    with hosts_with_link(given.megabits) as hosts, tempfile.TemporaryDirectory(prefix="p828-hosts-") as directory:
        for stage in given.stages:
            for within in ("all", "host"):
                job = Path(directory) / f"{stage}-{within}.json"
                sharded = ShardedConfig(stage=stage, shard_within=within)
                changed = dataclasses.replace(config, sharded=sharded)
                job.write_text(json.dumps({"config": to_dict(changed), "steps": given.steps}))
                run_on_nodes(hosts, given.ranks, [__file__, "--worker", str(job)], WITHIN)
                found = json.loads(job.with_suffix(".result").read_text())
                results.append({"stage": stage, "shard_within": within, **found})
                needed = found["bytes"] * 8 / (given.megabits * 1e6)
                cells = (
                    stage,
                    within,
                    f"{found['seconds']:.2f}",
                    f"{needed:.2f}",
                    f"{found['bytes'] / parameters:.2f}",
                )
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def shape(hidden: int, layers: int, accumulation: int) -> Config:
    values: dict[str, Any] = {
        "name": "two_hosts",
        "engine": "sharded",
        "model": {
            "vocab_size": 1024, "hidden_size": hidden, "moe_intermediate_size": 2 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
            "max_position_embeddings": 64, "n_routed_experts": 16, "num_experts_per_tok": 2,
        },
        "data": {"sequence_length": 64},
        "train": {
            "device": "cpu", "dtype": "float32", "micro_batch_size": 2, "gradient_accumulation": accumulation,
            "compile": "off",
        },
    }  # fmt: skip
    return from_dict(values, "two_hosts")


def work(job: dict[str, Any], result: Path) -> None:
    """One rank. Rank 0 writes a step's seconds and its bytes over the host's link, in the mean."""
    config = from_dict(job["config"], "job")
    with joined(config) as ranks:
        engine = ShardedEngine(config, ranks)
        seed = dataclasses.replace(config.train, seed=config.train.seed + ranks.rank)
        batches = rotate(random_batches(dataclasses.replace(config, train=seed), engine.device))
        for step in range(WARM_UP + job["steps"]):
            if step == WARM_UP:
                dist.barrier()
                started, sent = time.perf_counter(), sent_over_link()
            own = [next(batches) for _ in range(config.train.gradient_accumulation)]
            for batch in own:
                engine.forward_backward(batch, batch.num_targets * len(own) * ranks.size)
            engine.step(config.optimizer.learning_rate)
        dist.barrier()
        if ranks.is_first:
            total = {"seconds": time.perf_counter() - started, "bytes": sent_over_link() - sent}
            result.write_text(json.dumps({name: number / job["steps"] for name, number in total.items()}))


def sent_over_link() -> int:
    """Bytes that this host has sent."""
    return int(psutil.net_io_counters(pernic=True)[LINK].bytes_sent)


if __name__ == "__main__":
    main()
