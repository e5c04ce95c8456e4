"""Which engine and stage several processes get that were started without naming one."""

from dataclasses import replace

import pytest

from p828.config import load
from p828.train.engine_choice import fitting_stage, for_processes, planned_bytes


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


@pytest.mark.parametrize("engine, size, expected", [
    ("plain", 1, "plain"), ("plain", 2, "sharded"), ("deepspeed", 2, "deepspeed"), ("sharded", 1, "sharded"),
])  # fmt: skip
def test_an_engine_that_was_named_stays(monkeypatch: pytest.MonkeyPatch, engine: str, size: int, expected: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert for_processes(replace(load("60m"), engine=engine)).engine == expected
