"""What training, measuring and generating leave aside until it is needed."""

import subprocess
import sys
from pathlib import Path

from runs import write_toml

WITHOUT_THE_COMPILER = """
import sys
from p828.cli.main import dispatch

for engine in ("plain", "sharded"):
    assert dispatch(["train", sys.argv[1], "--name", engine, "--engine", engine]) == 0
assert dispatch(["train", sys.argv[1], "--name", "plain", "--train.steps", "14"]) == 0
assert dispatch(["evaluate", "runs/plain"]) == 0
assert dispatch(["generate", "runs/plain", "--prompt", "ab", "--max-new-tokens", "2"]) == 0
assert "torch" in sys.modules
assert "torch._dynamo" not in sys.modules, "its import takes a second"
"""


def test_nothing_imports_the_compiler_that_compiles_nothing(tmp_path: Path) -> None:
    path = write_toml(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_COMPILER, str(path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
