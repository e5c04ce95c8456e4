"""Runs on a file layer that fails or is slow, and under a clock that jumps."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p828.runs import checkpoint, file_names, records
from runs import in_process, p828, start, wait_for_step, write_text, write_toml
from same_run import assert_same_run
from shim import Shim

YEARS = 10**9  # seconds


def events(run: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in records.read(run / "metrics.jsonl") if line["kind"] == "event" and line["event"] == kind]


@pytest.mark.parametrize(
    "number", [errno.EIO, *(pytest.param(other, marks=pytest.mark.long) for other in (errno.EDQUOT, errno.ESTALE))]
)
def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_run_goes_on(
    tmp_path: Path, shim: Shim, number: int
) -> None:
    path = str(write_toml(tmp_path, evaluation={"every": 0}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    shim(file=".step_00000008.tmp", errno=number)
    code, said, error = p828("train", path, "--name", "failing", cwd=tmp_path)
    assert code == 0, error
    runs = tmp_path / "runs"
    (event,) = events(runs / "failing", "not_saved")
    assert "step_00000008: the checkpoint cannot be saved" in str(event["text"])
    assert "the newest checkpoint is of step 4" in said
    names = [file_names.name_of(step) for step in (4, 12)]
    assert sorted(found.name for found in (runs / "failing" / "checkpoints").iterdir()) == names
    assert_same_run(runs / "whole", runs / "failing", step=12)


def test_training_goes_on_beside_a_slow_disk(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path, train={"steps": 200}, evaluation={"every": 0}, checkpoint={"every": 20}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    shim(file=".tmp/optimizer.safetensors", delay=300_000)
    code, _, error = p828("train", path, "--name", "slow", cwd=tmp_path)
    assert code == 0, error
    runs = tmp_path / "runs"
    assert_same_run(runs / "whole", runs / "slow", step=200)
    at, beside = 0, 0  # the step that training has come to, and checkpoints that were complete only later
    for line in records.read(runs / "slow" / "metrics.jsonl"):
        at = line["step"] if line["kind"] == "step" else at
        beside += line.get("event") == "saved" and at > line["step"]
    assert beside > 0


def test_data_that_cannot_be_read_for_a_while(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path, evaluation={"every": 0}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    shim(file="/text/01", errno=errno.EIO, times=2)
    code, _, error = p828("train", path, "--name", "failing", cwd=tmp_path)
    assert code == 0, error
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "failing", step=12)


def test_an_output_without_room_or_reader_does_not_end_a_run(tmp_path: Path) -> None:
    write_toml(tmp_path)
    for name, output in (("full", "> /dev/full"), ("gone", "| head -1")):
        command = f"{sys.executable} -m p828 train tiny.toml --name {name} {output}; echo ${{PIPESTATUS[0]}} >&2"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == "0\n"
        run = tmp_path / "runs" / name
        assert file_names.step_of(checkpoint.resolve(run)) == 12
        assert "the output cannot be written" in (run / "log.txt").read_text()


def test_data_is_not_waited_for_when_the_run_is_asked_to_end(tmp_path: Path) -> None:
    write_text(tmp_path / "more", documents=1500, seed=1)
    data = {"files": [str(tmp_path / "more" / "*.txt")], "sequence_length": 512, "block_documents": 4}
    path = write_toml(
        tmp_path,
        model={"max_position_embeddings": 512},
        data={**data, "shuffle_rows": 4, "read_retries": 60},
        train={"steps": 40, "micro_batch_size": 8, "gradient_accumulation": 1},
        evaluation={"every": 0},
        checkpoint={"every": 900},
    )
    process = start("train", str(path), cwd=tmp_path)
    wait_for_step(process, 3)
    (tmp_path / "more").rename(tmp_path / "away")
    assert any("attempt 4 of 61 in 4 s" in line for line in process.stdout or ())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped by SIGTERM after step" in said


@pytest.mark.long
def test_a_clock_that_jumps(tmp_path: Path, shim: Shim) -> None:
    path = str(write_toml(tmp_path, train={"steps": 60}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    shim(jump=YEARS)
    seen = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(seen)) > 1, "the clock does jump"
    process = start("train", path, "--name", "jumping", cwd=tmp_path)
    wait_for_step(process, 10)
    process.kill()
    process.communicate()
    code, _, error = p828("train", path, "--name", "jumping", cwd=tmp_path)
    assert code == 0, error
    runs = tmp_path / "runs"
    assert_same_run(runs / "whole", runs / "jumping", step=60)
    steps = [line for line in records.read(runs / "jumping" / "metrics.jsonl") if line["kind"] == "step"]
    assert all(0 < line["seconds"] < YEARS / 2 for line in steps)


SEEN = "import time\nbegun = time.monotonic()\nwhile time.monotonic() < begun + 1: print(int(time.time()) // 10**8)"
