"""Runs with tokenizers of every kind: what is said of them, and the bytes of their text."""

import json
import re
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from runs import write_toml
from tokenizer_kinds import EOS, KINDS

QUICK = ("--train.steps", "1", "--evaluation.every", "0", "--schedule.warmup-steps", "0")
TEXT = f"The  cat{EOS} said:\n    don't  \n" + " " * 24 + "naïve 数据\n"


def write(tmp_path: Path, kind: str) -> str:
    KINDS[kind]().save(str(tmp_path / "t.json"))
    (tmp_path / "held-out.txt").write_text(TEXT * 3)
    data = {"validation": {"kind": "files", "files": [str(tmp_path / "held-out.txt")]}, "sequence_length": 64}
    tokenizer = {"name": str(tmp_path / "t.json"), "eos_token": EOS}
    return str(write_toml(tmp_path, data=data, tokenizer=tokenizer, model={"vocab_size": 0}, evaluation={"rows": 99}))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "word_piece", "word_level"])
def test_a_run(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, kind)
    assert dispatch(["train", path, *QUICK]) == 0
    said = " ".join(capsys.readouterr().out.split())
    lost = re.search(r"(\d+\.\d)% of the text does not come back from its tokens", said)
    assert (lost is not None) == (kind not in ("byte_level", "byte_fallback")), "the text has words that are not known"
    records = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    (measured,) = (record for record in records if record["kind"] == "eval")
    # Rows begin with a token that is no target; the other bytes are all those of the text.
    size = 3 * len(TEXT.encode())
    rows = -(-(measured["tokens"] + 1) // 65)
    assert size - 30 * rows <= measured["bytes"] <= size
    assert dispatch(["train", path, *QUICK]) == 0
    assert "come back" not in capsys.readouterr().out, "a run that goes on has been told"


def test_preparing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "word_level")
    assert dispatch(["prepare", path, "--data.prepared", "prepared"]) == 0
    assert "% of the text does not come back" in capsys.readouterr().out
    assert dispatch(["train", path, *QUICK, "--data.prepared", "prepared"]) == 0
