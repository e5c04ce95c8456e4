"""What a rank says when it cannot tell the others, or does not find them."""

import dataclasses
import os
import socket
from pathlib import Path

import pytest

from p828.distributed import group
from p828.distributed.group import ProcessGroup, joined
from p828.distributed.launcher import ALL_SET
from p828.errors import ConfigError, RunFailed
from runs import run_config


def fail() -> None:
    raise ConfigError("the first")


def test_an_error_is_not_hidden_by_that_of_telling_it() -> None:
    alone = ProcessGroup(0, 2)  # of two, without the process group that would join them
    with pytest.raises(ConfigError, match="the first"), alone.raise_together():
        fail()
    with pytest.raises(ConfigError, match="the first"):
        alone.on_rank_0(fail)
    with pytest.raises(ValueError, match="process group"), alone.raise_together():
        pass


START = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def environment_by_hand(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in [*ALL_SET, *(name for name in os.environ if name.startswith(("LOCAL_", "TORCHELASTIC_")))]:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("wrong, message", [
    ({"RANK": "2"}, "RANK = 2 in the environment: less than WORLD_SIZE = 2 is accepted; unset RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE = two in the environment: a number is accepted"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = -1 in the environment: a number is accepted"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT = 65536 in the environment: a port up to 65535 is accepted"),
])  # fmt: skip
@pytest.mark.parametrize("engine", ["plain", "sharded"])
def test_a_start_by_hand_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], message: str, engine: str
) -> None:
    environment_by_hand(monkeypatch, **{**START, "MASTER_PORT": "29500", **wrong})
    config = dataclasses.replace(run_config(tmp_path), engine=engine)
    with pytest.raises(ConfigError, match=message), joined(config):
        pass


@pytest.mark.parametrize("is_taken", [False, True])
def test_ranks_that_do_not_come_and_a_port_that_is_taken_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    monkeypatch.setattr(group, "AFTER_WATCHDOG", 0)
    values = run_config(tmp_path, sharded={"timeout_seconds": 1})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        if not is_taken:
            server.close()
        environment_by_hand(monkeypatch, **START, MASTER_PORT=port)
        reason = "address already in use" if is_taken else r"1/2 clients joined\."
        expected = rf"rank 0 of 2 cannot join the others by 127\.0\.0\.1, port {port}: .*{reason}$"
        with pytest.raises(RunFailed, match=expected), joined(dataclasses.replace(values, engine="sharded")):
            pass


@pytest.mark.parametrize("count, is_told", [("0", False), ("1", True)])
def test_ranks_that_torchrun_started_again_are_told_how_to_have_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, is_told: bool
) -> None:
    monkeypatch.setattr(group, "AFTER_WATCHDOG", 0)
    config = dataclasses.replace(run_config(tmp_path, sharded={"timeout_seconds": 1}), engine="sharded")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environment_by_hand(monkeypatch, **START, MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT=count)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RunFailed, match="rank 0 of 2 cannot join the others") as failure, joined(config):
        pass
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(failure.value)) == is_told
