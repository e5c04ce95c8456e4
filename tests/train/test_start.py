"""What a run records of its starts."""

import importlib.metadata
import shlex
import sys
from pathlib import Path

import pytest
import torch

from p828.runs import records
from p828.train.log.start import command_line, start_record
from runs import p828, write_toml


def test_each_start_records_its_command_as_it_was_typed(tmp_path: Path) -> None:
    """Which a shell would take apart into the same words; a name with a blank and a quote is one of them."""
    config, name = str(write_toml(tmp_path, evaluation={"every": 0}, checkpoint={"every": 2})), "it's one"
    given = [["train", config, "--name", name, "--train.steps", steps] for steps in ("2", "3")]
    for arguments in given:
        assert p828(*arguments, cwd=tmp_path)[0] == 0
    found = [one for one in records.read(tmp_path / "runs" / name / "metrics.jsonl") if one.get("event") == "started"]
    assert [shlex.split(start["command"]) for start in found] == [["p828", *arguments] for arguments in given]
    assert [start["step"] for start in found] == [0, 2]
    assert {start["directory"] for start in found} == {str(tmp_path)}
    assert {start["device"] for start in found} == {"cpu"}
    assert found[0]["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    "program, wanted",
    [
        ("/home/me/.venv/bin/p828", "p828 train 'my run'"),
        ("/lib/site-packages/p828/__main__.py", "p828 train 'my run'"),
        ("train_it.py", f"{Path(sys.executable).name} train_it.py train 'my run'"),
        ("/lib/other/__main__.py", f"{Path(sys.executable).name} /lib/other/__main__.py train 'my run'"),
    ],
)
def test_a_program_of_ones_own_is_named(program: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "my run"])
    assert command_line() == wanted
    assert start_record(torch.device("cpu"), 2, {})["device"] == "2 x cpu"
