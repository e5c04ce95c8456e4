"""Which ZeRO stage several processes get that were started without naming an engine."""

from dataclasses import replace

from p828.config import load
from p828.train.engine_choice import fitting_stage, planned_bytes


def test_the_lowest_stage_that_fits() -> None:
    config = load("planned")
    planned = [planned_bytes(config, stage, 8) for stage in (1, 2, 3)]
    assert planned == sorted(planned, reverse=True)
    for stage, taken in enumerate(planned, start=1):
        chosen, words = fitting_stage(config, 8, taken)
        assert chosen == stage
        assert words == f": about {taken / 1e9:.1f} GB of {taken / 1e9:.1f} GB free on each GPU"
    chosen, words = fitting_stage(config, 8, planned[-1] - 1)
    assert chosen == 3
    assert words.endswith("; lower train.micro_batch_size, or set train.gradient_checkpointing")


def test_a_replica_on_each_host_takes_the_memory_of_fewer_shards() -> None:
    config = load("planned")
    within = replace(config, sharded=replace(config.sharded, shard_within="host"))
    for stage in (1, 2, 3):
        assert planned_bytes(within, stage, 8, replicas=2) == planned_bytes(config, stage, 4)
    taken = planned_bytes(config, 2, 8)
    assert fitting_stage(config, 8, taken)[0] == 2
    assert fitting_stage(within, 8, taken, replicas=2)[0] == 3
