"""Runs in directories that cannot do all that a local disk can, and ones that are unwell."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from p828.runs import checkpoint, records
from p828.train import checkpoint_writer
from runs import in_process, p828, start, wait_for_step, write_toml
from same_run import assert_same_run, comparable_records
from shim import Shim


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_where_directories_cannot_be_renamed_files_are(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path, checkpoint={"every": 2, "keep_last": 2}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    shim(directories=errno.EPERM)
    code, _, error = p828("train", path, "--name", "bucket", cwd=tmp_path)
    assert code == 0, error
    runs = tmp_path / "runs"
    assert all(line.get("event") != "not_saved" for line in records.read(runs / "bucket" / "metrics.jsonl"))
    kept = saved_steps(runs / "bucket")
    assert kept[-2:] == ["step_00000010", "step_00000012"]
    assert all(name.startswith("step_") for name in kept)
    assert_same_run(runs / "whole", runs / "bucket", step=12)
    weights = runs / "bucket" / "checkpoints" / kept[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, said, error = p828("train", path, "--name", "bucket", cwd=tmp_path)
    assert code == 0, error
    assert "quarantined as damaged_step_00000012" in said
    assert_same_run(runs / "whole", runs / "bucket", step=12)


def test_kills_where_files_are_moved_one_by_one(tmp_path: Path, shim: Shim) -> None:
    """A kill before each rename of a save that replaces one: the older or the newer is there, and complete."""
    shim(directories=errno.EPERM)
    code, said = run_python(MOVED, tmp_path)
    assert code == 0, said
    outcomes = json.loads(said)
    old, new = (outcomes.count([kind, []]) for kind in ("old", "new"))
    assert outcomes == [["old", []]] * old + [["new", []]] * new
    assert old >= 6  # three files there and three back, and two directories
    assert new >= 3


def run_python(program: str, place: Path) -> tuple[int, str]:
    process = start(str(place), cwd=place, launcher=("-c", program))
    out, err = process.communicate(timeout=120)
    return process.returncode, out or err


MOVED = """
import json, os, signal, sys, torch
from pathlib import Path
from p828.runs import checkpoint
from p828.runs import records
from p828.train import checkpoint_writer
top, outcomes = Path(sys.argv[1]), []

def save(directory, value):
    checkpoint_writer.save(directory, 1, {"model": {"a": torch.full((9,), value)}}, {"value": value})

for moment in range(1, 100):
    directory = top / str(moment)
    save(directory, 1.0)
    child = os.fork()
    if child == 0:
        calls = 0
        def count(event, arguments):
            global calls
            is_counted = event in ("os.rename", "os.rmdir", "os.remove")
            calls += is_counted
            if is_counted and calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        save(directory, 2.0)
        os._exit(0)
    was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    newest, notes = checkpoint.find_newest(directory)
    loaded = checkpoint.load(newest)
    assert loaded.tensors["model"]["a"].unique().tolist() == [loaded.state["value"]]
    left = [path.name for path in directory.iterdir() if path.name.startswith(".")]
    outcomes.append(["old" if loaded.state["value"] == 1.0 else "new", notes + left])
    if not was_killed:
        break
print(json.dumps(outcomes))
"""


@pytest.mark.long
def test_without_locks_a_file_keeps_others_out(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path, train={"steps": 100_000}, evaluation={"every": 0}))
    shim(flock=errno.ENOLCK)
    first = start("train", path, cwd=tmp_path)
    wait_for_step(first, 1)
    owner = tmp_path / "runs" / "tiny" / ".lock.owner"
    assert json.loads(owner.read_text())["pid"] == first.pid
    code, _, said = p828("train", path, cwd=tmp_path)
    assert code == 2
    assert "another p828 train is at work on this run" in said
    assert ".lock.owner" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, _, said = p828("train", path, "--train.steps", "1", cwd=tmp_path)  # the dead one's file is no obstacle
    assert code == 0, said
    assert not owner.exists()
    elsewhere = {"host": "another", "boot": "x", "processes": "y", "pid": 1, "start": "1"}
    owner.write_text(json.dumps(elsewhere))
    code, _, said = p828("train", path, "--train.steps", "1", cwd=tmp_path)
    assert code == 2
    assert "if its process is no more, remove that file" in said
    assert json.loads(owner.read_text()) == elsewhere


def test_where_nothing_can_be_renamed_the_run_ends_before_it_begins(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    shim(renames=errno.EOPNOTSUPP)
    code, _, said = p828("train", path, cwd=tmp_path)
    assert code == 2
    assert said == (
        "p828: runs/tiny: a run cannot be kept there, as its file system does not write a file and rename it: "
        "Operation not supported\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_for_good", [False, True])
def test_a_checkpoint_that_cannot_be_read_for_now_is_not_damaged(tmp_path: Path, shim: Shim, is_for_good: bool) -> None:
    path = str(write_toml(tmp_path, checkpoint={"every": 4, "keep_last": 3}, data={"read_retries": 2}))
    assert in_process("train", path, cwd=tmp_path)[0] == 0
    run = tmp_path / "runs" / "tiny"
    before, names = comparable_records(run), saved_steps(run)
    shim(file="/checkpoints/step_", errno=errno.EIO, **({} if is_for_good else {"times": 2}))
    code, out, said = p828("train", path, "--train.steps", "14", cwd=tmp_path)
    assert "step_00000012: manifest.json cannot be read: Input/output error; attempt 2 of 3 in 1 s" in said
    if is_for_good:
        assert code == 1
        assert said.splitlines()[-1].endswith("manifest.json cannot be read: Input/output error")
        assert saved_steps(run) == names
        assert comparable_records(run) == before
    else:
        assert code == 0, said
        assert "resumed from step 12" in out
        assert all(name.startswith("step_") for name in saved_steps(run))


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_read_to_evaluate_it_is_tried_five_times(tmp_path: Path, shim: Shim) -> None:
    assert in_process("train", str(write_toml(tmp_path)), cwd=tmp_path)[0] == 0
    shim(file="/checkpoints/step_", errno=errno.EIO)
    code, _, said = p828("evaluate", "runs/tiny", cwd=tmp_path)
    assert code == 1
    assert "attempt 2 of 5 in 1 s" in said
    assert said.splitlines()[-1].endswith("manifest.json cannot be read: Input/output error")


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    path = checkpoint_writer.save(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {})
    (path / name).unlink()
    os.mkfifo(path / name) if kind == "fifo" else (path / name).mkdir()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=name):
        checkpoint.load(path)
