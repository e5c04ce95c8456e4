"""Checkpoints whose checksums are right and whose tensors are not what a run wrote, resumed by either engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from runs import write_toml

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
PROGRAM = Path(__file__).with_name("tensor_changes.py")
ENGINES = {"plain": (), "deepspeed": ("--engine", "deepspeed")}
SHARE = {"plain": 0.3, "deepspeed": 0.1}  # of the examples, as a start of DeepSpeed takes seconds


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run with a checkpoint of step 3, in the same directory."""
    place = tmp_path_factory.mktemp("tensors")
    path = write_toml(place, train={"steps": 3}, evaluation={"every": 0, "prompts": []}, checkpoint={"every": 3})
    assert dispatch(["train", str(path), "--runs-dir", str(place)]) == 0
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_each_is_taken_or_answered_in_a_line(trained: Path, engine: str) -> None:
    """No traceback and no crash, and an answer names the checkpoint; what is taken trains on for a step."""
    seed = os.environ.get("FUZZ_SEED", "0")
    count = str(max(int(EXAMPLES * SHARE[engine]), 1))
    arguments = [sys.executable, str(PROGRAM), str(trained), str(trained.parent), seed, count, *ENGINES[engine]]
    path = os.pathsep.join(sys.path)
    found = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith('["')]
    assert len(lines) == int(count)
    for change, code, err in lines:
        said = [line for line in err.splitlines() if "p828: " in line]
        assert code in (0, 2), f"{change}: {err}"
        assert "Traceback" not in err, f"{change}: {err}"
        if code == 2:
            assert len(said) == 1, f"{change}: {err}"
            assert "step_00000003" in said[0], f"{change}: {err}"
            assert len(said[0]) < 2000, f"{change}: {err}"
    assert any(code == 2 for _, code, _ in lines)
