import signal
from pathlib import Path

import psutil
import pytest

from p828.runs import records
from runs import start, wait_for_step, write_toml


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
    assert "is complete at step 300" in " ".join(said.split())
    assert "Weights & Biases does not answer and is left as it is" in error
    assert "Traceback" not in error
    found = [
        record["step"] for record in records.read(tmp_path / "runs/tiny/metrics.jsonl") if record["kind"] == "step"
    ]
    assert found == [*range(1, steps + 1)]
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE
