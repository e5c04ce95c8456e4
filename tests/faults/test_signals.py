"""Runs that are asked to end."""

import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from p828.train import checkpoint
from runs import p828, start, wait_for_step, write_toml
from same_run import assert_same_run


def test_a_launchers_sigterm_after_the_terminals_sigint_is_no_second_wish(tmp_path: Path) -> None:
    process = start("train", str(write_toml(tmp_path, train={"steps": 100_000})), cwd=tmp_path)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "which is saved" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_is_saved_and_goes_on_exactly(tmp_path: Path, number: signal.Signals) -> None:
    path = str(write_toml(tmp_path, model={"dropout": 0.1}, train={"steps": 60}, checkpoint={"every": 1000}))
    assert p828("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    process = start("train", path, "--name", "asked", cwd=tmp_path)
    wait_for_step(process, 9)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = re.fullmatch(
        rf"p828: stopped by {number.name} after step (\d+), which is saved; the same command goes on from there\n", said
    )
    assert found, said
    newest = checkpoint.resolve(tmp_path / "runs" / "asked")
    assert checkpoint.step_of(newest) == int(found[1]) >= 9
    code, out, said = p828("train", path, "--name", "asked", cwd=tmp_path)
    assert code == 0, said
    assert f"resumed from step {found[1]}" in out
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "asked", step=60)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Between the two a step cannot end: it takes seconds."""
    slow = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    train = {"micro_batch_size": 32, "gradient_accumulation": 8}
    path = str(write_toml(tmp_path, model=slow, train=train, evaluation={"every": 0}))
    process = start("train", path, cwd=tmp_path)
    wait_for_step(process, 1)
    for _ in range(20):  # of signals that come before the first is handled, the system keeps one
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said == ""
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*"))
