"""Small runs on local text, in this process or as the command would be started."""

import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import tomli_w

from p828.cli.main import dispatch
from p828.config import Config, from_dict


def write_text(directory: Path, documents: int = 60, seed: int = 0) -> Path:
    """A folder of .txt documents of made-up words with some order in them."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(50)]
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        start = draw.randrange(50)
        text = " ".join(words[(start + 7 * i + draw.randrange(3)) % 50] for i in range(draw.randint(20, 200)))
        (directory / f"{index:03}.txt").write_text(text + "\n")
    return directory


def tiny_values(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A configuration that trains for 12 steps in about a second, as TOML values."""
    text = tmp_path / "text"
    if not text.exists():
        write_text(text)
    return {
        "model": {
            "vocab_size": 300, "hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        },
        "data": {
            "source": "files", "files": [str(text / "*.txt")], "sequence_length": 32, "shuffle_rows": 8,
            "validation": {"kind": "held_out", "fraction": 0.2},
        },
        "tokenizer": {"name": "train", "vocab_size": 300},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 12, "micro_batch_size": 2, "gradient_accumulation": 2, "device": "cpu"},
        "evaluation": {"every": 5, "rows": 4, "prompts": ["ab"], "max_new_tokens": 4},
        "checkpoint": {"every": 4},
    }  # fmt: skip


def run_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    """`tiny_values` with the given sections' keys changed, its runs under tmp_path/runs."""
    values: dict[str, Any] = tiny_values(tmp_path)
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return from_dict({"name": "tiny", "runs_dir": str(tmp_path / "runs"), **values}, "tiny")


def write_toml(tmp_path: Path, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = tiny_values(tmp_path)
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def start(
    *arguments: str, cwd: Path, launcher: Sequence[str] = ("-m", "p828"), **options: Any
) -> subprocess.Popen[str]:
    """`p828 ARGUMENTS` in a process of its own, or in several that a launcher starts."""
    # One thread each: the tests run side by side.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def p828(*arguments: str, cwd: Path, **options: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `p828 ARGUMENTS`."""
    process = start(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def in_process(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """What `p828` returns, of the command in this process: for runs that nothing happens to.

    It is seconds quicker, for PyTorch is imported here.
    """
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = dispatch(list(arguments))
    finally:
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Read what a run prints until it has come to a step; it goes on meanwhile."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            return
    raise AssertionError(f"the run ended before step {step}")
