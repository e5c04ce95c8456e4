"""How a model would be trained, as far as memory and links go: which engine, at which stage, on how many GPUs."""

import dataclasses
from typing import NamedTuple

from p828.config import Config
from p828.engine.deepspeed.settings import LEAST_STAGE, deepspeed_settings

LIVE_NUMBERS = 10**9  # of gathered weights at stage 3, DeepSpeed's default
STAGES = (1, 2, 3)


class Setup(NamedTuple):
    stage: int | None = None
    """ZeRO stage; None for the plain engine."""
    ranks: int = 1
    is_sharded: bool = False
    """By p828's own engine for several GPUs; else, with a stage, by DeepSpeed."""
    is_bfloat16: bool = True
    """What the layers compute in; else float32."""
    has_bfloat16_moments: bool = True
    """Of matrices, without DeepSpeed; all other moments are float32."""
    offload_optimizer: bool = False
    """Masters, moments and the step's gradients are in main memory."""
    offload_param: bool = False
    """So are the weights."""
    bucket_numbers: int = 50_000_000
    """Gradients that DeepSpeed reduces together."""
    has_two_buckets: bool = True
    """One is filled while the other is reduced."""
    live_numbers: int = LIVE_NUMBERS
    """Weights that stage 3 keeps gathered at most."""
    hosts: int = 1
    """That have the ranks, each as many."""
    shards_within_hosts: bool = False
    """Each host has a replica, sharded over its ranks (`sharded.shard_within`)."""

    @property
    def name(self) -> str:
        return "plain" if self.stage is None else f"ZeRO {self.stage}"

    @property
    def engine(self) -> str:
        """As the configuration has it."""
        if self.stage is None:
            return "plain"
        return "sharded" if self.is_sharded else "deepspeed"

    @property
    def replicas(self) -> int:
        return self.hosts if self.shards_within_hosts else 1

    @property
    def shards(self) -> int:
        """Ranks that share a replica."""
        return self.ranks // self.replicas

    @property
    def reduces_by_hooks(self) -> bool:
        """Whether DeepSpeed's hooks reduce each micro-batch's gradients, in place of p828 its own sums."""
        return self.engine == "deepspeed" and ((self.stage or 0) >= 2 or self.offload_optimizer)

    @property
    def computed_bytes(self) -> int:
        """Of a number that the layers compute with."""
        return 2 if self.is_bfloat16 else 4


def plain_setup(config: Config) -> Setup:
    """One GPU, in bfloat16."""
    return Setup(has_bfloat16_moments=config.optimizer.moment_dtype != "float32")


def sharded_setup(config: Config, stage: int, ranks: int, hosts: int = 1) -> Setup:
    """By p828's own engine for several GPUs, in bfloat16."""
    is_within = config.sharded.shard_within == "host"
    setup = plain_setup(config)
    return setup._replace(stage=stage, ranks=ranks, is_sharded=True, hosts=hosts, shards_within_hosts=is_within)


def deepspeed_setup(config: Config, stage: int, ranks: int, hosts: int = 1) -> Setup:
    """With the configuration's other settings of DeepSpeed. What is offloaded is so where the stage allows it.

    Raises ConfigError for a DeepSpeed file that is not accepted.
    """
    as_deepspeed = dataclasses.replace(config, engine="deepspeed")
    zero = deepspeed_settings(as_deepspeed, "bfloat16", ranks).values["zero_optimization"]
    offloads = {key: zero.get(key, {}).get("device") == "cpu" and stage >= least for key, least in LEAST_STAGE.items()}
    return Setup(
        stage,
        ranks,
        bucket_numbers=zero["reduce_bucket_size"],
        has_two_buckets=zero["overlap_comm"],
        live_numbers=zero.get("stage3_max_live_parameters", LIVE_NUMBERS),
        hosts=hosts,
        **offloads,
    )


def setup_of(config: Config, stage: int, ranks: int, hosts: int = 1) -> Setup:
    """At a stage, by the engine that the configuration has for several GPUs: DeepSpeed if it asks for that."""
    return (deepspeed_setup if config.engine == "deepspeed" else sharded_setup)(config, stage, ranks, hosts)


def configured_stage(config: Config, ranks: int) -> int | None:
    """The stage that the configuration asks for; None where it asks for the plain engine."""
    if config.engine == "deepspeed":
        return deepspeed_settings(config, "bfloat16", ranks).stage
    return config.sharded.stage if config.engine == "sharded" else None
