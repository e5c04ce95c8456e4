"""A run on a disk that fills up, and has room again."""

import json
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p828.runs import checkpoint, file_names, records
from runs import in_process, p828, start, wait_for_step, write_toml
from same_run import assert_same_run

MEGABYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, which only root can make."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left, to the last byte."""
    filling = disk / "filling"
    with filling.open("wb", buffering=0) as file:
        for size in (MEGABYTE, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filling


def test_a_run_goes_on_while_the_disk_is_full_and_keeps_its_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, train={"steps": 300}, evaluation={"every": 0}, checkpoint={"every": 10}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    process = start("train", path, "--name", "full", "--runs-dir", str(small_disk), cwd=tmp_path)
    wait_for_step(process, 30)
    filling = fill(small_disk)
    run = small_disk / "full"
    said = next(line for line in process.stdout or () if "cannot be saved" in line)
    assert "No space left on device" in said
    assert "The run goes on; the newest checkpoint is of step" in said
    checkpoint.verify(checkpoint.resolve(run))
    wait_for_step(process, 150)
    filling.unlink()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same_run(tmp_path / "runs" / "whole", run, step=300)
    events = [line["event"] for line in records.read(run / "metrics.jsonl") if line["kind"] == "event"]
    assert set(events) == {"started", "saved", "not_saved", "ended"}


@pytest.mark.long
def test_a_run_that_cannot_be_saved_at_its_end_says_so(small_disk: Path, tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, train={"steps": 200}, evaluation={"every": 0}, checkpoint={"every": 1000}))
    process = start("train", path, "--name", "full", "--runs-dir", str(small_disk), cwd=tmp_path)
    wait_for_step(process, 20)
    fill(small_disk)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "step_00000200: the checkpoint cannot be saved: No space left on device" in said


def test_records_that_cannot_be_written_end_the_run_saved(tmp_path: Path) -> None:
    """At a limit on the size of files, which those of a checkpoint keep below."""
    path = str(write_toml(tmp_path, train={"steps": 200}, evaluation={"every": 0}, checkpoint={"every": 1000}))
    assert in_process("train", path, "--train.steps", "2", cwd=tmp_path)[0] == 0
    run, limit = tmp_path / "runs" / "tiny", 1_000_000
    long = json.dumps({"kind": "event", "step": 0, "text": "long"})
    size = limit - 5_000 - (run / "metrics.jsonl").stat().st_size
    with (run / "metrics.jsonl").open("a") as file:
        file.write(long.replace("long", "x" * size) + "\n")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, said = p828("train", path, cwd=tmp_path, preexec_fn=limited)
    assert code == 1
    found = re.fullmatch(
        r"p828: .*metrics.jsonl: cannot be written: File too large\n"
        r"The run stops after step (\d+), which is saved; the same command goes on from there\n",
        said,
    )
    assert found, said
    assert file_names.step_of(checkpoint.resolve(run)) == int(found[1]) > 2
