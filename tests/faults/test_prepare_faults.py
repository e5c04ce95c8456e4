"""Preparing on a disk that fails, with text that is wrong, and asked to end; training on shards that are cut."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from p828.data.tokens.directory import GOES_ON
from p828.runs import checkpoint, file_names
from runs import p828, start, wait_for_step, write_toml
from shim import Shim

FLAGS = ["--data.packing", "best_fit", "--prepare.shard-tokens", "2000"]
SLOWLY = """
import sys, time
import p828.data.tokens.prepare, p828.data.tokens.text_reader
p828.data.tokens.prepare.SAVE_EVERY, p828.data.tokens.text_reader.BATCH_DOCUMENTS = 0.0, 3
from p828.cli.main import dispatch
sys.exit(dispatch(["prepare", *sys.argv[1:]]))
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_toml(tmp_path))


@pytest.mark.parametrize(
    "file, number, kept",
    [
        ("training-00003.tokens.partial", errno.ENOSPC, "training-00002.tokens"),
        ("training-waiting-0.partial", errno.EIO, "tokenizer.json"),
        ("/prepared/.progress.json.tmp", errno.ENOSPC, "tokenizer.json"),
        ("/prepared/.manifest.json.tmp", errno.EDQUOT, "training-00002.tokens"),
        ("/prepared/.tokenizer.json.tmp", errno.ENOSPC, ".lock"),
    ],
)
def test_a_disk_that_fails_loses_nothing(
    toml: str, shim: Shim, monkeypatch: pytest.MonkeyPatch, file: str, number: int, kept: str
) -> None:
    assert dispatch(["prepare", toml, *FLAGS, "--data.prepared", "whole"]) == 0
    shim(file=file, errno=number)
    code, _, said = p828("prepare", toml, *FLAGS, "--data.prepared", "prepared", cwd=Path.cwd())
    assert code == 1, said
    assert re.fullmatch(rf"p828: .*: cannot be written: .*{os.strerror(number)}.*\n{GOES_ON}\n", said)
    assert (Path("prepared") / kept).exists()
    assert dispatch(["prepare", toml, *FLAGS, "--data.prepared", "prepared"]) == 0
    assert contents(Path("prepared")) == contents(Path("whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_saves_and_goes_on(toml: str, number: int) -> None:
    assert dispatch(["prepare", toml, *FLAGS, "--data.prepared", "whole"]) == 0
    arguments = [toml, *FLAGS, "--data.prepared", "prepared"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not Path("prepared/progress.json").exists():
        assert process.poll() is None
        time.sleep(0.01)  # between two looks at what it has written
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert f"{signal.Signals(number).name}: saving what is made" in out
    assert said == f"p828: stopped by {signal.Signals(number).name}. {GOES_ON}\n"
    assert process.returncode == 1
    assert Path("prepared/progress.json").exists()
    assert dispatch(["prepare", *arguments]) == 0
    assert contents(Path("prepared")) == contents(Path("whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_asked_to_end_before_anything_is_made_it_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = start("prepare", "quickstart", "--data.prepared", "new/prepared", cwd=tmp_path)
    assert process.stdout is not None
    assert any("training a tokenizer" in line for line in process.stdout)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert out.startswith(f"{name}: ending")
    assert said == f"p828: stopped by {name}. Nothing was made yet, and the same command begins again\n"
    assert process.returncode == 1
    assert not (tmp_path / "new").exists()


def test_a_malformed_line_of_the_second_source_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"some text {i} " * 20}) + "\n" for i in range(300)]
    Path("bad.jsonl").write_text("".join(lines))
    mixture = [
        {"name": "one", "prepared": "one", "source": "files", "files": [str(tmp_path / "text" / "*.txt")]},
        {"name": "two", "prepared": "two", "source": "files", "files": ["bad.jsonl"], "text_field": "text"},
    ]
    toml = str(write_toml(tmp_path, data={"mixture": mixture}))
    assert dispatch(["prepare", toml, "--tokenizer.training-megabytes", "1"]) == 0
    Path("one").rename("whole-one")
    Path("two").rename("whole-two")
    Path("tok.json").write_bytes(Path("whole-one/tokenizer.json").read_bytes())
    for wrong in (0, 280):
        broken = [line.replace("}", "!") if i == wrong else line for i, line in enumerate(lines)]
        Path("bad.jsonl").write_text("".join(broken))
        capsys.readouterr()
        assert dispatch(["prepare", toml, "--tokenizer.name", "tok.json"]) == 1
        said = capsys.readouterr().err
        assert f"bad.jsonl:{wrong + 1}: not a line of JSON" in said
        assert said.endswith(f"{GOES_ON}\n")
        assert Path("one/manifest.json").exists()
    Path("bad.jsonl").write_text("".join(lines))
    assert dispatch(["prepare", toml, "--tokenizer.name", "tok.json"]) == 0
    for name in ("one", "two"):
        shards = {path.name: path.read_bytes() for path in Path(name).glob("*-0*")}
        assert shards == {path.name: path.read_bytes() for path in Path(f"whole-{name}").glob("*-0*")}


def test_wrong_text_met_by_the_tokenizer_leaves_nothing_half_made(
    toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text('{"text": "one"}\n{"text": ')
    assert dispatch(["prepare", toml, "--data.files", "bad.jsonl", "--data.prepared", "prepared"]) == 2
    assert "bad.jsonl:2: not a line of JSON" in capsys.readouterr().err
    assert not Path("prepared").exists()
    Path("bad.jsonl").write_text('{"text": ')
    assert dispatch(["prepare", toml, "--data.files", "bad.jsonl", "--data.prepared", "prepared"]) == 2
    assert "training a tokenizer" not in capsys.readouterr().out, "which may take an hour, and would be lost"
    assert dispatch(["prepare", toml, "--data.prepared", "prepared"]) == 0


def test_a_shard_that_is_cut_while_training_ends_the_run_saved(toml: str) -> None:
    flags = ["--data.prepared", "prepared", "--train.steps", "5000", "--evaluation.every", "0"]
    assert dispatch(["prepare", toml, "--data.prepared", "prepared"]) == 0
    process = start("train", toml, *flags, "--checkpoint.every", "90000", "--data.read-retries", "0", cwd=Path.cwd())
    wait_for_step(process, 3)
    os.truncate("prepared/training-00000.tokens", 100)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "training-00000.tokens: damaged or changed: cut to 100 bytes\nThe run stops after step" in said
    assert file_names.step_of(checkpoint.resolve(Path("runs/tiny"))) >= 3
