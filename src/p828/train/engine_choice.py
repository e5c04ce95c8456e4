"""The ZeRO stage of a run that several processes were started for without naming an engine; its precision."""

from dataclasses import replace

import torch

from p828.config import Config, with_vocabulary
from p828.distributed.group import ProcessGroup
from p828.engine.sharded.mesh import shards_of
from p828.model.backend import check_widths
from p828.optim.adamw import pick_moment_dtype
from p828.plan.peak import peak
from p828.plan.setup import STAGES, sharded_setup
from p828.system.device import pick_device, pick_dtype


def with_fitting_stage(config: Config, ranks: ProcessGroup, before: int) -> tuple[Config, str]:
    """With the stage that every rank's GPU has room for, and a line about it; on CPUs with stage 1.

    `before` is how many processes p828 chose the run's stage for before; 0 if it did not.
    All ranks must call it, and choose the same. Raises ConfigError, on all ranks, as `mesh.shards_of`.
    """
    device, stage, estimate = pick_device(config.train.device), STAGES[0], ""
    if device.type == "cuda":
        free = min(int(room) for (room,) in ranks.all_gather([torch.cuda.mem_get_info(device)[0]]))
        replicas = ranks.size // shards_of(config.sharded, ranks)
        stage, estimate = fitting_stage(config, ranks.size, free, replicas)
        if config.train.dtype == "float32":
            estimate += ", as in bfloat16: float32 takes more, and is not planned"
    in_place = f" in place of {before}" if before else ""
    line = f'{ranks.size} processes{in_place}: engine = "sharded", ZeRO stage {stage}{estimate}'
    return replace(config, sharded=replace(config.sharded, stage=stage)), line


def fitting_stage(config: Config, ranks: int, free_bytes: int, replicas: int = 1) -> tuple[int, str]:
    """The lowest stage that takes no more than that of each GPU, else the last one; and what it takes, in words."""
    planned = {stage: planned_bytes(config, stage, ranks, replicas) for stage in STAGES}
    fitting = [stage for stage in STAGES if planned[stage] <= free_bytes]
    stage = fitting[0] if fitting else STAGES[-1]
    words = f": about {planned[stage] / 1e9:.1f} GB of {free_bytes / 1e9:.1f} GB free on each GPU"
    remedy = "" if fitting else "; lower train.micro_batch_size, or set train.gradient_checkpointing"
    return stage, words + remedy


def planned_bytes(config: Config, stage: int, ranks: int, replicas: int = 1) -> int:
    """Of a run on each GPU, by the plan; with a replica on each host, if there are several."""
    setup = sharded_setup(config, stage, ranks, replicas)
    return peak(with_vocabulary(config), setup, config.train.micro_batch_size).total


def check_precision(config: Config) -> None:
    """Raises ConfigError for moments and widths that no engine takes in the run's dtype on its device."""
    device = pick_device(config.train.device)
    dtype = pick_dtype(config.train.dtype, device)
    check_widths(config.model, device, dtype)
    pick_moment_dtype(config.optimizer.moment_dtype, dtype, device)
