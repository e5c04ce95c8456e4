import json
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest

from p828.runs import records
from runs import p828, start, wait_for_step, write_toml


def steps_of(tmp_path: Path) -> list[int]:
    found = records.read(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    return [record["step"] for record in found if record["kind"] == "step"]


@pytest.mark.long
def test_a_run_whose_wandb_process_hangs_ends_as_it_would(tmp_path: Path) -> None:
    """All of its steps are trained and recorded; then it waits a minute for W&B, and ends with its own exit code."""
    steps = 300
    path = write_toml(tmp_path, wandb={"mode": "offline"}, train={"steps": steps}, evaluation={"every": 0})
    process = start("train", str(path), cwd=tmp_path)
    wait_for_step(process, 10)
    (core,) = (child for child in psutil.Process(process.pid).children() if child.name() == "wandb-core")
    core.send_signal(signal.SIGSTOP)
    said, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert f"is complete at step {steps}" in " ".join(said.split())
    assert "Weights & Biases does not answer and is left as it is" in error
    assert "Traceback" not in error
    assert steps_of(tmp_path) == [*range(1, steps + 1)]
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE


@pytest.mark.long
def test_rows_for_a_trackio_server_that_cannot_be_reached_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=x")  # connections are refused
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write_toml(tmp_path, trackers={"trackio": True})
    code, _, error = p828("train", "tiny.toml", cwd=tmp_path)
    assert code == 0, error
    assert "Traceback" not in error
    with sqlite3.connect(tmp_path / "trackio" / "p828.db") as kept:
        rows = kept.execute("SELECT step, metrics FROM metrics").fetchall()
    assert sorted(step for step, metrics in rows if "train/loss" in json.loads(metrics)) == steps_of(tmp_path)


@pytest.mark.long
def test_of_two_processes_one_writes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    path = write_toml(tmp_path, trackers={"tensorboard": True})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "p828")
    code, _, error = p828("train", str(path), cwd=tmp_path, launcher=launcher)
    assert code == 0, error
    (file,) = (tmp_path / "runs" / "tiny" / "tensorboard").iterdir()
    tagged = [(event.step, value.tag) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    assert [step for step, tag in tagged if tag == "train/loss"] == steps_of(tmp_path)
    assert {"perf/rank_memory_bytes/rank_0", "perf/rank_memory_bytes/rank_1"} <= {tag for _, tag in tagged}
