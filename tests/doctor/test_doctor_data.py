"""What is said of a configuration's tokenizer and data, on text with known faults."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from p828.api import build_tokenizer
from p828.config import Config
from p828.data.tokens.prepare import prepare
from p828.doctor.check import Check
from p828.doctor.data import check_data, sample_of
from p828.doctor.tokenizer import check_tokenizer
from runs import run_config, write_text


def checks_of(config: Config) -> dict[str, Check]:
    tokenizer, check = check_tokenizer(config)
    return {one.name: one for one in (check, *check_data(config, tokenizer))}


def lines(directory: Path, texts: list[str]) -> list[str]:
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path)]


def word_tokenizer(directory: Path, words: list[str]) -> str:
    """One that knows these words and no others."""
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "?", *words])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    path = directory / "words.json"
    inner.save(str(path))
    return str(path)


def test_sound_text_is_counted_and_comes_back(tmp_path: Path) -> None:
    found = checks_of(run_config(tmp_path))
    assert {check.status for check in found.values()} == {"ok"}
    assert set(found) == {"tokenizer", "data files", "epochs", "validation"}
    assert "300 ids" in found["tokenizer"].text
    kept = next(int(word) for word in found["data files"].text.split() if word.isdigit())
    assert 40 <= kept <= 55  # of 60, without a fifth that is held out
    assert "0 repeated; all of the text survives decoding" in found["data files"].text
    assert not (tmp_path / "runs").exists()


def test_repeated_documents_are_counted(tmp_path: Path) -> None:
    texts = [f"the text of number {number} is its own" for number in range(90)] + ["one that comes often"] * 10
    validation = {"kind": "files", "files": [str(tmp_path / "text" / "*.txt")]}
    config = run_config(tmp_path, data={"files": lines(tmp_path, texts), "validation": validation})
    tokenizer, _ = check_tokenizer(config)
    (found, *_) = check_data(config, tokenizer)
    assert (found.name, found.status) == ("data files", "warning")
    assert "a sample of 100 documents" in found.text
    assert "9 repeated" in found.text
    assert "--prepare.drop-duplicates" in found.remedy


@pytest.mark.parametrize("unknown, status", [(0, "ok"), (2, "warning"), (60, "failure")])
def test_text_that_does_not_come_back_is_measured(tmp_path: Path, unknown: int, status: str) -> None:
    """Of a vocabulary of words, those that it does not have come back as another character."""
    name = word_tokenizer(tmp_path, ["a"])
    texts = ["a"] * (200 - unknown) + ["b"] * unknown
    config = run_config(tmp_path, tokenizer={"name": name, "vocab_size": 300})
    tokenizer, check = check_tokenizer(config)
    assert check.status in ("ok", "warning")
    assert tokenizer is not None
    found = sample_of(texts, tokenizer)
    assert found.lost == pytest.approx(unknown / 200, abs=1e-9)
    from p828.doctor.data import _judged

    assert _judged("data", replace(found, repeated=0), "documents").status == status


def test_conversations_are_counted_and_their_messages_come_back(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    questions = [f"say <|endoftext|> {number} times" for number in range(200)]
    answer = {"role": "assistant", "content": "I would rather not, é"}
    talks = [{"messages": [{"role": "user", "content": question}, answer]} for question in questions]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    data = {"files": [str(path)], "messages_field": "messages"}
    found = checks_of(run_config(tmp_path, data=data, train={"steps": 1}))
    assert {check.status for check in found.values()} == {"ok"}
    assert "0 repeated; all of the text survives decoding" in found["data files"].text


def test_a_vocabulary_that_the_model_has_no_rows_for_is_a_failure(tmp_path: Path) -> None:
    name = word_tokenizer(tmp_path, [f"w{number}" for number in range(500)])
    tokenizer, check = check_tokenizer(run_config(tmp_path, tokenizer={"name": name, "vocab_size": 300}))
    assert tokenizer is None
    assert check.status == "failure"
    assert "vocab_size = 300" in check.text


@pytest.mark.parametrize("name", ["no/such.json", "broken.json"])
def test_a_tokenizer_that_cannot_be_had_is_a_failure_and_the_text_is_read_all_the_same(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "broken.json").write_text("{")
    found = checks_of(run_config(tmp_path, tokenizer={"name": str(tmp_path / name), "vocab_size": 300}))
    assert found["tokenizer"].status == "failure"
    assert found["data files"].status == "ok"
    assert "survives" not in found["data files"].text


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text" / "bad.jsonl"
    write_text(tmp_path / "text", documents=3)
    path.write_text('{"text": "fine"}\n{"text"\n')
    validation = {"kind": "files", "files": [str(tmp_path / "text" / "*.txt")]}
    config = run_config(tmp_path, data={"files": [str(path)], "validation": validation})
    (found,) = check_data(config, None)
    assert found.status == "failure"
    assert "bad.jsonl" in found.text
    assert "2" in found.text
    tokenizer = check_tokenizer(config)[1]  # is trained on that text
    assert tokenizer.status == "failure"
    assert "the run's text" in tokenizer.remedy


def test_many_epochs_are_warned_of(tmp_path: Path) -> None:
    found = checks_of(run_config(tmp_path, train={"steps": 10_000}))
    assert found["epochs"].status == "warning"
    assert "times through" in found["epochs"].text


def test_prepared_data_is_sampled(tmp_path: Path) -> None:
    directory = tmp_path / "prepared"
    config = run_config(tmp_path, data={"prepared": str(directory)})
    source = run_config(tmp_path)
    tokenizer = build_tokenizer(source)
    prepare(source, directory, tokenizer, lambda preparation: None)
    tokenizer.save(directory / "tokenizer.json")
    found = checks_of(config)
    assert found["data files"].status == "ok"
    assert "prepared documents" in found["data files"].text
    assert "of the prepared data" in found["tokenizer"].text
    next(directory.glob("training*.tokens")).write_bytes(b"short")
    assert checks_of(config)["data files"].status == "failure"
