"""What `p828 export` refuses, and what it leaves where it fails or is broken off."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from export_cases import FILES, NATIVE

from exported import save_model
from p828.cli.main import dispatch
from p828.errors import ConfigError, DataError
from p828.files import LOCK_FILE, locked
from p828.interchange.export import export_model
from runs import p828 as p828_command
from shim import Shim
from tiny import tiny_model


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: (path.mkdir(), (path / "a").touch()), "there is something in it; a new directory is accepted"),
        (lambda path: path.touch(), "it is a file; a new directory"),
        (lambda path: path.parent.touch(), "cannot be made: Not a directory"),
    ],
)
def test_what_is_in_the_way_is_kept(
    prepare: Any, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "parent" / "export"
    if "made" not in message:
        target.parent.mkdir()
    prepare(target)
    before = sorted(tmp_path.rglob("*"))
    assert dispatch(["export", str(run), str(target)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_name_what_is_wrong(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = save_model(tmp_path / "own", tiny_model(scoring_func="softmax"))
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (
            [own, tmp_path / "new", "--native-only"],
            "glm4_moe: sinks, softmax router; mimo_v2_flash: shared expert, soft",
        ),
        ([tmp_path / "nothing", tmp_path / "new"], "no such directory; give a run's directory"),
        ([run, tmp_path / "new", "--dtype", "float16"], "float32"),
        ([run, tmp_path / "new", "--native-olny"], "did you mean --native-only?"),
        ([run], "no DIR|FILE.gguf given"),
    ):
        assert dispatch(["export", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_no_run_is_trained_in_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export_model(run, tmp_path / "runs" / "there")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    commands = [
        ["train", "runs/there"],
        ["prepare", "runs/there", "--data.prepared", "tokens"],
        ["prove-resume", "runs/there"],
        ["train", "quickstart", "--name", "there"],
        ["train", "runs/there/config.toml", "--name", "there"],
    ]
    for command in commands:
        assert dispatch(command) == 2
        assert "p828 train CONFIG --name NEW --train.init-from runs/there" in capsys.readouterr().err, command
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert dispatch(["train", "runs/there/config.toml", "--dry-run"]) == 0


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = save_model(tmp_path / "run", tiny_model(**NATIVE))
    path = run / "checkpoints" / "step_00000010"
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"step_00000010: model.safetensors is not what was written"):
        export_model(path, tmp_path / "new" / "export")
    with pytest.raises(ConfigError, match=r"has no complete checkpoint: .*step_00000010"):
        export_model(run, tmp_path / "new" / "export")
    assert os.listdir(tmp_path) == ["run"]


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, shim: Shim) -> None:
    shim(file=".export.tmp/model", errno=errno.ENOSPC)
    code, _, said = p828_command("export", str(run), "export", cwd=tmp_path)
    assert (code, said.splitlines()[-1]) == (1, "p828: export: cannot be written: No space left on device")
    assert not os.listdir(tmp_path)


def test_broken_off_it_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """Ctrl-C comes when the second file begins."""

    def interrupt(line: str) -> None:
        if "00002" in line:
            assert any((tmp_path / ".export.tmp").glob("model-00001*"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(run, tmp_path / "export", report=interrupt, largest_file=40_000)
    assert not os.listdir(tmp_path)


def test_what_a_killed_export_left_goes(run: Path, tmp_path: Path) -> None:
    (tmp_path / ".export.tmp" / "folder").mkdir(parents=True)
    (tmp_path / ".export.tmp" / LOCK_FILE).touch()
    with locked(tmp_path / ".export.tmp", ""), pytest.raises(ConfigError, match="another process is writing it"):
        export_model(run, tmp_path / "export")
    export_model(run, tmp_path / "export")
    assert os.listdir(tmp_path) == ["export"]
    assert {path.name for path in (tmp_path / "export").iterdir()} == FILES
