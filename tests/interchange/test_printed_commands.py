"""The commands that are printed can be given to a shell as they are, whatever the paths in them."""

import ast
import shlex
from pathlib import Path

import pytest

from exported import EOS, letters, save_model
from p828.cli.main import dispatch
from p828.data.tokenizer.chat_template import built_in
from tiny import tiny_model

ODD = 'Ünï 🙂 it\'s "x" $(y)'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(text: str, before: str) -> list[str]:
    """What a shell makes of the rest of the line after the text `before`."""
    return shlex.split(text.partition(before)[2].partition("\n")[0])


def test_paths_are_quoted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = letters("<|im_start|>", "<|im_end|>")
    tokenizer.template = built_in("chatml", EOS, tokenizer.special_tokens)
    save_model(Path("run"), tiny_model(attention_sinks=False), tokenizer)
    assert dispatch(["export", "run", ODD]) == 0
    loading = capsys.readouterr().out.partition("from_pretrained")[2].strip()
    assert ast.literal_eval(loading) == ODD
    assert dispatch(["import", ODD, "--name", "a b"]) == 0
    out = capsys.readouterr().out
    assert words(out, "try it") == ["p828", "generate", "runs/a b", "--prompt", "TEXT", "--chat"]
    started = ["p828", "train", "runs/a b", "--name", "NEW", "--train.init-from", "runs/a b", "--data.files", "FILE"]
    assert words(out, "train it on") == started
    assert dispatch(["train", "runs/a b"]) == 2
    assert words(capsys.readouterr().err, "starts from them: ") == started[:7]
    assert dispatch(["evaluate", ODD]) == 2
    assert words(capsys.readouterr().err, "layout: ")[:3] == ["p828", "import", ODD]
    assert dispatch(["train", ODD]) == 2
    assert words(capsys.readouterr().err, "starts from it with ")[:7] == [
        *started[:2],
        "CONFIG",
        *started[3:6],
        f"{ODD};",
    ]
