"""Runs on the text that a user brings: one file, records that are no documents, files that move."""

import json
import random
from pathlib import Path

import pytest
import torch

from p828.cli.main import dispatch
from p828.data.text import packing
from p828.runs import records
from runs import write_toml
from same_run import assert_same_run, final_state

STEPS = 12
BAD_LINE = 9  # from 0; trained on in step 7 or so


def lines(count: int = 60) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdef", k=draw.randint(2, 6))) for _ in range(40)]
    return [json.dumps({"text": " ".join(draw.choices(words, k=30))}) + "\n" for _ in range(count)]


def train(directory: Path, text: Path, *flags: str, name: str = "run", **sections: dict[str, object]) -> int:
    data: dict[str, object] = {
        "files": [str(text)],
        "shuffle_rows": 2,
        "block_documents": 3,
        "validation": {"kind": "files", "files": [str(directory / "validation.txt")]},
    }
    (directory / "validation.txt").write_text("abc def " * 50)
    path = write_toml(directory, data={**data, **sections.pop("data", {})}, train={"steps": STEPS}, **sections)
    return dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs"), *flags])


def with_bad_line(path: Path, number: int) -> list[str]:
    good = lines()
    path.write_text("".join([*good[:number], '{"text": oops}\n', *good[number + 1 :]]))
    return good


@pytest.mark.parametrize("every", [1, 1000])
@pytest.mark.parametrize("data", [{}, {"streams": 3}])
def test_a_run_stops_saved_at_a_bad_line_and_goes_on_when_it_is_mended(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    data: dict[str, object],
) -> None:
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 2)  # so that so short a text is not read before the first step
    text = tmp_path / "text.jsonl"
    good = with_bad_line(text, BAD_LINE)
    sections: dict[str, dict[str, object]] = {
        "checkpoint": {"every": every},
        "data": data,
        "tokenizer": {"name": str(tmp_path / "runs/whole/tokenizer.json")},
    }
    text.write_text("".join(good))
    assert train(tmp_path, text, name="whole", data=data, checkpoint={"every": every}) == 0
    with_bad_line(text, BAD_LINE)
    assert train(tmp_path, text, **sections) == 1
    said = capsys.readouterr().err
    assert "text.jsonl:10: not a line of JSON" in said
    assert "is saved; the same command goes on from there" in said
    step = int(said.split("after step ")[1].split(",")[0])
    assert 0 < step < STEPS
    assert (tmp_path / f"runs/run/checkpoints/step_{step:08}").is_dir()
    assert train(tmp_path, text, **sections) in (1, 2)  # as long as it is there
    text.write_text("".join(['{"text": "changed"}\n', *good[1:]]))
    assert train(tmp_path, text, **sections) == 2
    assert "text.jsonl changed" in capsys.readouterr().err
    text.write_text("".join(good))
    assert train(tmp_path, text, **sections) == 0
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/run", STEPS)


def test_bad_lines_that_are_passed_over_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 2)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(lines()))
    assert train(tmp_path, text, "--train.steps", "2", name="other") == 0
    tokenizer = {"name": str(tmp_path / "runs/other/tokenizer.json")}
    with_bad_line(text, BAD_LINE)
    assert train(tmp_path, text, tokenizer=tokenizer) == 1
    assert train(tmp_path, text, "--data.bad_records", "skip", tokenizer=tokenizer) == 0
    assert "data.bad_records = 'stop', now 'skip'" in capsys.readouterr().out
    steps = [line for line in records.read(tmp_path / "runs/run/metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert "bad_records" not in steps[0]
    assert steps[-1]["bad_records"] == 1


def test_a_tokenizer_is_kept_whatever_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, validation, kept = tmp_path / "text.jsonl", tmp_path / "bad.jsonl", tmp_path / "runs/run/tokenizer.json"
    text.write_text("".join(lines()))
    with_bad_line(validation, 3)
    data = {"validation": {"kind": "files", "files": [str(validation)]}}
    flags = ["--evaluation.rows", "20"]
    assert train(tmp_path, text, *flags, data=data) == 2
    bad_line, line = capsys.readouterr().err.splitlines()
    assert "bad.jsonl:4: not a line of JSON" in bad_line
    assert line == f"{kept}, just trained, is kept: the same command goes on with it"
    before = kept.read_bytes()
    assert train(tmp_path, text, *flags, "--evaluation.prompts", "ab " * 100, data=data) == 2
    assert "evaluation.prompts" in capsys.readouterr().err
    validation.write_text("".join(lines()))
    assert train(tmp_path, text, *flags, "--model.hidden-size", "64", data=data) == 0
    assert "training a tokenizer" not in capsys.readouterr().out
    assert kept.read_bytes() == before


def test_a_tokenizer_of_other_text_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, other, kept = tmp_path / "text.jsonl", tmp_path / "other.txt", tmp_path / "runs/run/tokenizer.json"
    text.write_text("".join(lines()))
    other.write_text("ghi jkl mno " * 400)
    too_long = ["--evaluation.prompts", "ab " * 100]
    changes: list[tuple[Path, list[str]]] = [
        (text, []), (other, []), (other, ["--tokenizer.vocab-size", "280"]), (text, ["--train.seed", "1"])
    ]  # fmt: skip
    found = []
    for source, flags in changes:
        assert train(tmp_path, source, *too_long, *flags) == 2
        assert f"{kept}, just trained, is kept" in capsys.readouterr().err
        found.append(kept.read_bytes())
    assert found[0] != found[1]


def test_text_that_was_moved_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(lines()))
    schedule = {"kind": "constant"}  # the rate does not depend on the number of steps
    assert train(tmp_path, text, name="whole", schedule=schedule) == 0
    assert train(tmp_path, text, "--train.steps", "6", schedule=schedule) == 0
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / "text.jsonl")
    capsys.readouterr()
    assert train(tmp_path, moved, schedule=schedule) == 0
    said = capsys.readouterr().out
    assert "data.files = " in said
    assert str(moved) in said
    ours, theirs = (final_state(tmp_path / "runs" / name, STEPS) for name in ("whole", "run"))
    assert all(torch.equal(tensor, theirs.tensors["model"][key]) for key, tensor in ours.tensors["model"].items())
    moved.write_text(moved.read_text() + "\n")
    assert train(tmp_path, moved, "--train.steps", "20", schedule=schedule) == 2
    assert "elsewhere/text.jsonl changed or is another one" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("share", ["0.01", "0.5", "0.99"])
def test_one_text_file_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str) -> None:
    (tmp_path / "book").mkdir()
    text = tmp_path / "book" / "input.txt"
    text.write_text("".join(json.loads(line)["text"] + "\n" for line in lines(400)))
    validation = {"kind": "held_out", "fraction": float(share)}
    assert train(tmp_path, tmp_path / "book", data={"validation": validation}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"the last {float(share) * 100:g}% of each document in" in said
    assert "validation loss" in said
    assert train(tmp_path, text, "--train.steps", "14", data={"validation": validation}) == 0  # the file for its folder


def test_more_streams_than_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(lines(3)))
    assert train(tmp_path, text, data={"streams": 3}) == 0
    assert train(tmp_path, text, name="more", data={"streams": 4}) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no documents in part 4 of data.streams = 4 of data.files" in said
    assert "Lower data.streams" in said
    assert "runs/more/tokenizer.json, just trained, is kept" in said
