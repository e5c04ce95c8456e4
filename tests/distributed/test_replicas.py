"""Runs on hosts that each have a replica; the ranks of one machine are told that they are on two."""

import shutil
import sys
from pathlib import Path

import pytest
from launch import (
    Run,
    Stage,
    assert_same_bits,
    assert_same_training,
    launched,
    the_message,
    torchrun,
    train,
)

from p828.engine.sharded.mesh import ranks_of_a_host
from p828.errors import ConfigError

pytestmark = pytest.mark.xdist_group("ranks")

RANKS = 4
WITHIN_HOSTS = ("--sharded.shard-within", "host")


def with_environment(*changes: str) -> tuple[str, ...]:
    """A launcher of four ranks whose environment is changed by a line of shell."""
    line = f'{"; ".join(changes)}; exec {sys.executable} -m p828 "$@"'
    return torchrun(RANKS, "--no-python", "sh", "-c", line, "sh")


AS_TWO_HOSTS = with_environment("export LOCAL_WORLD_SIZE=2 LOCAL_RANK=$((RANK % 2))")


def on_two_hosts(config: Path, run: Path, stage: Stage, *flags: str, killed_after: int = 0) -> str:
    """Train a run to its end, or `kill -9` all of it after a step; what it printed."""
    with launched(config, run, stage, RANKS, *WITHIN_HOSTS, *flags, launcher=AS_TWO_HOSTS) as launch:
        if killed_after:
            launch.wait_for_step(killed_after)
            return ""
        code, out, err = launch.end()
    assert code == 0, err
    return out


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sharded-1", "sharded-3"])
def test_a_killed_run_goes_on_on_any_number_of_hosts(config: Path, whole: Run, tmp_path: Path, stage: Stage) -> None:
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    assert "within each host" in on_two_hosts(config, undisturbed, stage)
    assert_same_training(undisturbed, whole(None, 1))
    on_two_hosts(config, killed, stage, killed_after=9)
    on_one, by_plain = (Path(shutil.copytree(killed, tmp_path / name)) for name in ("on_one", "by_plain"))
    assert "resumed from step" in on_two_hosts(config, killed, stage)
    assert_same_bits(killed, undisturbed)
    assert "resumed from step" in train(config, on_one, "sharded-2", 2, *WITHIN_HOSTS)
    assert_same_training(on_one, whole(None, 1))
    assert "resumed from step" in train(config, by_plain, None, 1)
    assert_same_training(by_plain, whole(None, 1))


def test_hosts_need_the_same_number_of_ranks() -> None:
    assert ranks_of_a_host([(0, 2), (1, 2), (0, 2), (1, 2)]) == 2
    assert ranks_of_a_host([(0, 1), (0, 1), (0, 1)]) == 1
    for places, words in (
        ([(0, 2), (1, 2), (0, 1)], "the same number of processes on every host, not with 1 and 2"),
        ([(0, 2), (1, 2), (0, 2)], "with 2 processes on every host, not with 3 in all"),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], "where processes are numbered host by host"),
        ([(0, 0), (0, 0)], "where the launcher sets LOCAL_WORLD_SIZE"),
    ):
        with pytest.raises(ConfigError, match=words):
            ranks_of_a_host(places)


@pytest.mark.long
def test_hosts_that_are_not_known_are_refused_before_anything_is_written(config: Path, tmp_path: Path) -> None:
    launcher = with_environment("unset LOCAL_WORLD_SIZE")
    with launched(config, tmp_path / "refused", "sharded-2", RANKS, *WITHIN_HOSTS, launcher=launcher) as launch:
        message = the_message(launch)
    assert message.startswith('p828: sharded.shard_within = "host": accepted where the launcher sets LOCAL_WORLD_SIZE')
    assert not (tmp_path / "refused").exists()
