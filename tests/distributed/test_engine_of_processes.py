"""Which engine several processes get that were started without naming one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import p828
from p828.config import Config, ShardedConfig
from p828.config.values import to_dict
from p828.distributed.engine_of_processes import for_processes, is_left_to_p828
from p828.distributed.launcher import ALL_SET
from p828.errors import ConfigError
from runs import tiny_values, write_toml


def launch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for name, value in zip(ALL_SET, ("0", str(size), "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "given, settled, of_train",
    [
        ({}, "plain", "sharded"),
        ({"sharded": {"stage": 3}}, "sharded", "sharded"),
        ({"sharded": {"shard_within": "host"}}, "plain", "sharded"),
        ({"deepspeed": {"config": "zero2"}}, "deepspeed", "deepspeed"),
        ({"engine": "deepspeed"}, "deepspeed", "deepspeed"),
    ],
)
def test_the_settings_that_are_given_say_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], settled: str, of_train: str
) -> None:
    """By overrides or in a file. A stage that is not given is left to `train`, which knows the room on GPUs."""
    launch(monkeypatch, 2)
    overrides = {
        f"{table}.{key}": value for table, values in given.items() if table != "engine" for key, value in values.items()
    }
    if "engine" in given:
        overrides["engine"] = given["engine"]
    by_overrides = p828.load_config(write_toml(tmp_path), overrides)
    path = tmp_path / "file.toml"
    path.write_text(tomli_w.dumps({**given, **tiny_values(tmp_path)}))
    for config in (by_overrides, p828.load_config(path)):
        assert config.engine == settled
        assert for_processes(config, 2).engine == of_train


@pytest.mark.parametrize("size, given, message", [
    (2, {"engine": "plain"}, 'engine = "plain" trains on one device, not on 2: give engine = "sharded"'),
    (2, {"sharded.stage": 3, "deepspeed.stage": 3}, 'sharded.stage = 3: accepted with engine = "sharded"'),
    (1, {"engine": "plain", "sharded.stage": 3}, 'sharded.stage = 3: accepted with engine = "sharded"'),
])  # fmt: skip
def test_what_contradicts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, given: dict[str, Any], message: str
) -> None:
    launch(monkeypatch, size)
    with pytest.raises(ConfigError, match=message):
        p828.load_config(write_toml(tmp_path), given)


def test_they_say_so_to_one_launched_process_and_not_to_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALL_SET:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match='accepted with engine = "deepspeed"'):
        p828.load_config(write_toml(tmp_path), {"deepspeed.config": "zero2"})
    launch(monkeypatch, 1)
    assert p828.load_config(write_toml(tmp_path), {"deepspeed.config": "zero2"}).engine == "deepspeed"
    assert p828.load_config(write_toml(tmp_path)).engine == "plain"


@pytest.mark.parametrize("engine, size, expected", [
    ("plain", 1, "plain"), ("plain", 2, "sharded"), ("deepspeed", 2, "deepspeed"), ("sharded", 1, "sharded"),
])  # fmt: skip
def test_an_engine_that_was_named_stays(engine: str, size: int, expected: str) -> None:
    assert for_processes(p828.Config(engine=engine), size).engine == expected


@pytest.mark.parametrize("size, engine, chosen_for", [(8, "sharded", 8), (4, "sharded", 4), (1, "plain", 0)])
def test_a_stage_that_p828_chose_is_chosen_again_for_another_number(size: int, engine: str, chosen_for: int) -> None:
    chosen = Config(engine="sharded", sharded=ShardedConfig(stage=3, stage_chosen_for=8))
    assert is_left_to_p828(chosen, size) == (size != 8)
    found = for_processes(chosen, size)
    assert (found.engine, found.sharded.stage_chosen_for) == (engine, chosen_for)


def test_a_stage_that_was_given_stays_for_any_number() -> None:
    given = Config(engine="sharded", sharded=ShardedConfig(stage=3))
    assert all(for_processes(given, size) == given and not is_left_to_p828(given, size) for size in (1, 2, 8))


@pytest.mark.parametrize(
    "given, engine, stage",
    [
        ({}, "sharded", 2),
        ({"sharded.stage": 3}, "sharded", 3),
        ({"engine": "sharded"}, "sharded", 2),
        ({"deepspeed.stage": 2}, "deepspeed", 2),
        ({"train.seed": 1}, "sharded", 2),
    ],
)
def test_what_is_given_for_a_run_ends_p828_s_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], engine: str, stage: int
) -> None:
    launch(monkeypatch, 2)
    before = replace(p828.load_config(write_toml(tmp_path)), engine="sharded")
    before = replace(before, sharded=replace(before.sharded, stage=2, stage_chosen_for=8), name="run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(to_dict(before)))
    config = p828.load_config(tmp_path / "run", given)
    assert config.engine == engine
    assert (config.deepspeed.stage if engine == "deepspeed" else config.sharded.stage) == stage
    assert (config.sharded.stage_chosen_for == 8) == (not {"engine", "sharded.stage", "deepspeed.stage"} & {*given})
