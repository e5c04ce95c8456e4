"""The engine of processes that a launcher started without naming one. Imports no torch."""

from collections.abc import Collection
from dataclasses import replace

from p828.config import Config
from p828.distributed.launcher import launched
from p828.errors import ConfigError


def with_settled_engine(config: Config, given: Collection[str]) -> Config:
    """With the engine whose settings a launcher's processes were given; unchanged where `train` is to find a stage.

    `given` are dotted keys. Raises ConfigError where the plain engine is named for several processes.
    """
    size, is_named = launched().size, "engine" in given
    if config.engine != "plain" or not launched().is_launched or (is_named and size == 1):
        return config
    if is_named:
        raise ConfigError(
            f'engine = "plain" trains on one device, and {size} processes were started: give engine = "sharded", '
            "or leave it out"
        )
    if any(key.startswith("deepspeed.") for key in given):
        return replace(config, engine="deepspeed")
    return replace(config, engine="sharded") if "sharded.stage" in given else config


def for_processes(config: Config) -> Config:
    """With the sharded engine in place of the plain one, which trains on one device, if there are several processes."""
    return replace(config, engine="sharded") if config.engine == "plain" and launched().size > 1 else config
