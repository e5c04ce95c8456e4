"""The engine and the ZeRO stage of a run that several processes were started for without naming one."""

from dataclasses import replace

import torch

from p828.config import Config, with_vocabulary
from p828.distributed.group import ProcessGroup
from p828.distributed.launcher import launched
from p828.plan.sharded import STAGES, lowest_stage, sharded_total
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
    sized = with_vocabulary(config)
    free = min(int(room) for (room,) in ranks.all_gather([torch.cuda.mem_get_info(device)[0]]))
    fitting = lowest_stage(sized, ranks.size, free)
    stage = fitting or STAGES[-1]
    taken = f"about {sharded_total(sized, stage, ranks.size) / 1e9:.1f} GB of {free / 1e9:.1f} GB free on each GPU"
    line = f"{begun}{stage}: {taken}"
    if fitting is None:
        line += "; lower train.micro_batch_size, or set train.gradient_checkpointing"
    return _with_stage(config, stage), line


def _with_stage(config: Config, stage: int) -> Config:
    return replace(config, sharded=replace(config.sharded, stage=stage))
