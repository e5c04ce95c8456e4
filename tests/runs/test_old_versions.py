"""What p828 0.1.0 left on disk is gone on with, as that version itself went on with it.

`data_of_old_versions` holds two runs that were killed at step 7, one of them on two ranks through DeepSpeed, a prepared
directory, and in `expected.json` the records of that version when it trained on in one process.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from p828.cli.main import dispatch
from p828.runs import records

DATA = Path(__file__).parents[1] / "data_of_old_versions"
# float32 sums in another order, as on another processor: units of 2^-24 of a loss near 5, which 12 steps multiply.
TOLERANCE = 1e-5
ON_ONE_PROCESS = {"whole-tensors": (), "two-ranks": ("--engine", "plain", "--train.gradient-accumulation", "2")}


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """What the old version recorded. The working directory becomes a copy of its data, whose paths are relative."""
    shutil.copytree(DATA, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    found: dict[str, list[dict[str, Any]]] = json.loads(Path("expected.json").read_text())
    return found


def assert_recorded(run: str, expected: list[dict[str, Any]]) -> None:
    first = expected[0]["step"]
    kept = [line for line in records.read(Path("runs", run, "metrics.jsonl")) if line["step"] >= first]
    found = [line for line in kept if line["kind"] in ("step", "eval")]
    assert len(found) == len(expected)
    for line, old in zip(found, expected, strict=True):
        for key, value in old.items():
            near = pytest.approx(value, abs=TOLERANCE) if isinstance(value, float) else value
            assert line[key] == near, f"{line['kind']} of step {line['step']}: {key}"


@pytest.mark.parametrize("run", ON_ONE_PROCESS)
def test_a_run_is_resumed(
    run: str, expected: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["train", f"runs/{run}", *ON_ONE_PROCESS[run]]) == 0
    assert "resumed from step 5" in capsys.readouterr().out
    assert_recorded(run, expected[run])


@pytest.mark.parametrize("run", ON_ONE_PROCESS)
def test_a_checkpoint_is_evaluated_and_sampled(
    run: str, expected: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = [line["loss"] for line in records.read(Path("runs", run, "metrics.jsonl")) if line["kind"] == "eval"]
    assert dispatch(["evaluate", f"runs/{run}"]) == 0
    shown = re.search(r"^loss +([0-9.]+)", capsys.readouterr().out, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(before[-1], abs=TOLERANCE)  # at step 5, where the checkpoint is
    generate = ["generate", f"runs/{run}/checkpoints/step_00000005", "--temperature", "0", "--max-new-tokens", "8"]
    assert dispatch([*generate, "--prompt", "ab"]) == 0
    assert "dj bgd bgd b" in capsys.readouterr().out  # as the old version said


def test_prepared_data_is_trained_on(expected: dict[str, list[dict[str, Any]]]) -> None:
    flags = ["--name", "from-prepared", "--data.prepared", "prepared", "--train.steps", "4"]
    assert dispatch(["train", "tiny.toml", *flags]) == 0
    # The rows are the same. The losses are not: initial weights are drawn in another way since.
    of_the_data = ("kind", "step", "rows", "tokens", "documents", "cut_documents")
    old = [{key: line[key] for key in of_the_data if key in line} for line in expected["from-prepared"]]
    assert all("rows" in line for line in old if line["kind"] == "step")
    assert_recorded("from-prepared", old)
