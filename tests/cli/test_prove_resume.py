import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p828.cli.main import dispatch
from runs import write_toml


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return str(write_toml(tmp_path, model={"dropout": 0.1}, train={"steps": 40}))


def test_a_proof(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["prove-resume", toml, "--kills", "3"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert len(re.findall(r"^kill \d of 3: at step \d+ of 40(?:, while a checkpoint was written)?$", said, re.M)) == 3
    assert re.search(r"^the same, bit for bit, through 3 kills, \d of them while a checkpoint was written", said, re.M)
    assert not list(Path("runs").iterdir())


def test_a_difference_is_told_and_kept(
    toml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of another seed in place of the one that is resumed."""
    dumps = tomli_w.dumps

    def with_its_own_seed(values: dict[str, Any]) -> str:
        return dumps({**values, "train": {**values["train"], "seed": int(values["name"] == "killed")}})

    monkeypatch.setattr(tomli_w, "dumps", with_its_own_seed)
    assert dispatch(["prove-resume", toml, "--kills", "2"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^p828: NOT the same, through 2 kills, .*: model: .* numbers of .* differ$", said, re.M)
    assert Path("runs/tiny-prove-resume/whole/metrics.jsonl").exists()
    assert dispatch(["prove-resume", toml]) == 2
    assert "is left from another proof" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--kills", "1"], "--kills 1: a whole number of at least 2"),
        (["--kills", "many"], "--kills many: a whole number"),
        (["--ranks", "2"], '--ranks 2: accepted with --engine deepspeed; engine = "plain"'),
        (["--resume-ranks", "2"], "--resume-ranks: accepted with --ranks"),
        (["--ranks", "2", "--resume-ranks", "3", "--engine", "deepspeed"], "a divisor of a step's 4 micro-batches"),
        (["--kill", "3"], "unknown flag --kill; did you mean --kills?"),
    ],
)
def test_wrong_input(toml: str, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert dispatch(["prove-resume", toml, *flags]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
