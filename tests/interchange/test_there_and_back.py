"""The example that takes a model through every other program and back."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "there_and_back.py"


def test_a_model_comes_back_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), "--steps", "12"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("there and back: every number is the same\n")
