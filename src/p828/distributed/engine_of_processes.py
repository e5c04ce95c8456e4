"""The engine of several processes that were started without naming one. Imports no torch."""

from collections.abc import Collection
from dataclasses import replace

from p828.config import Config
from p828.distributed.launcher import Process
from p828.errors import ConfigError


def with_settled_engine(config: Config, given: Collection[str], process: Process) -> Config:
    """With the engine whose settings a launcher's processes were given; unchanged where `train` is to find a stage.

    `given` are dotted keys. Raises ConfigError where the plain engine is named for several processes.
    """
    is_named, is_of_deepspeed = "engine" in given, any(key.startswith("deepspeed.") for key in given)
    if config.sharded.stage_chosen_for and (is_named or is_of_deepspeed or "sharded.stage" in given):
        engine = "plain" if is_of_deepspeed and not is_named else config.engine
        config = replace(config, engine=engine, sharded=replace(config.sharded, stage_chosen_for=0))
    if config.engine != "plain" or not process.is_launched or (is_named and process.size == 1):
        return config
    if is_named:
        raise ConfigError(
            f'engine = "plain" trains on one device, not on {process.size}: give engine = "sharded", or leave it out'
        )
    if is_of_deepspeed:
        return replace(config, engine="deepspeed")
    return replace(config, engine="sharded") if "sharded.stage" in given else config


def is_left_to_p828(config: Config, size: int) -> bool:
    """Whether p828 chooses the engine of `size` processes: none is named, or p828 chose it for another number."""
    is_chosen = config.engine == "sharded" and config.sharded.stage_chosen_for not in (0, size)
    return config.engine == "plain" or is_chosen


def for_processes(config: Config, size: int) -> Config:
    """With the engine that p828 chooses where that is left to it: the sharded one, or the plain one of one process.

    `stage_chosen_for` says so. The sharded engine's stage is for `train` to find, which knows the room on GPUs.
    """
    if not is_left_to_p828(config, size) or (config.engine == "plain" and size == 1):
        return config
    if size == 1:
        return replace(config, engine="plain", sharded=replace(config.sharded, stage=1, stage_chosen_for=0))
    return replace(config, engine="sharded", sharded=replace(config.sharded, stage_chosen_for=size))
