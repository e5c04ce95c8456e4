"""The engine and the ZeRO stage of a run that several processes were started for without naming one."""

from dataclasses import replace

import torch

from p828.config import Config, with_vocabulary
from p828.distributed.group import ProcessGroup
from p828.distributed.launcher import launched
from p828.plan.peak import peak
from p828.plan.setup import STAGES, sharded_setup
from p828.system.device import pick_device


def for_processes(config: Config) -> Config:
    """With the sharded engine in place of the plain one, which trains on one device, if there are several processes."""
    return replace(config, engine="sharded") if config.engine == "plain" and launched().size > 1 else config


def with_fitting_stage(config: Config, ranks: ProcessGroup) -> tuple[Config, str]:
    """With the lowest stage that every rank's GPU has room for by estimate, and a line about it.

    On CPUs it is stage 1. All ranks must call it, and choose the same.
    """
    device = pick_device(config.train.device)
    begun = f'{ranks.size} processes: engine = "sharded", ZeRO stage '
    if device.type != "cuda":
        return _with_stage(config, 1), f"{begun}1"
    free = min(int(room) for (room,) in ranks.all_gather([torch.cuda.mem_get_info(device)[0]]))
    planned = {stage: _planned_bytes(config, stage, ranks.size) for stage in STAGES}
    fitting = [stage for stage in STAGES if planned[stage] <= free]
    stage = fitting[0] if fitting else STAGES[-1]
    line = f"{begun}{stage}: about {planned[stage] / 1e9:.1f} GB of {free / 1e9:.1f} GB free on each GPU"
    if not fitting:
        line += "; lower train.micro_batch_size, or set train.gradient_checkpointing"
    return _with_stage(config, stage), line


def _planned_bytes(config: Config, stage: int, ranks: int) -> int:
    """Of a run on each GPU."""
    return peak(with_vocabulary(config), sharded_setup(config, stage, ranks), config.train.micro_batch_size).total


def _with_stage(config: Config, stage: int) -> Config:
    return replace(config, sharded=replace(config.sharded, stage=stage))
