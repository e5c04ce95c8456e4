import random
from dataclasses import replace
from pathlib import Path

import pytest
from data_samples import text, write_jsonl

from p828.config import DataConfig, PrepareConfig, ValidationConfig
from p828.data.build import held_out_lines, training_documents
from p828.data.retry import NO_RETRY
from p828.data.text.documents import divided, is_held_out
from p828.data.text.held_out import are_few, trained_on_too, unused_text_field
from p828.data.text.open import open_in_order, open_training, open_validation
from p828.data.tokens.text_reader import Reader


def config(path: Path, fraction: float = 0.1) -> DataConfig:
    return DataConfig(source="files", files=(str(path),), validation=ValidationConfig(fraction=fraction))


def book(lines: int = 500) -> str:
    draw = random.Random(1)
    return "".join(" ".join(draw.choices(["one", "naïve", "数据", "word"], k=8)) + "\n" for _ in range(lines))


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("content", ["book", "one line", "no space", "two"])
def test_the_end_of_one_document_is_held_out(tmp_path: Path, fraction: float, content: str) -> None:
    whole = {"book": book(), "one line": "word " * 400, "no space": "x" * 999, "two": "ab"}[content]
    (tmp_path / "a.txt").write_text(whole)
    (training,) = open_training(config(tmp_path / "a.txt", fraction), seed=0, epochs=1)
    (validation,) = open_validation(config(tmp_path / "a.txt", fraction))
    assert training + validation == whole
    if len(whole) > 100:  # a quarter of the smaller side is how far the cut may move, and a character at least
        assert abs(len(validation) - fraction * len(whole)) <= min(fraction, 1 - fraction) * len(whole) / 4 + 2
    if content == "book" and 0.001 < fraction < 0.99:
        assert training.endswith("\n"), "cut behind a line"


def test_ten_documents_held_out_decide(tmp_path: Path) -> None:
    texts = [text(i) for i in range(100)]
    many, few = (write_jsonl(tmp_path / f"{n}.jsonl", texts[:n]) for n in (100, 99))
    by_hash = sorted(t for t in texts if is_held_out(t, 0.1))
    assert sorted(open_validation(config(many))) == by_hash
    halves = zip(sorted(open_training(config(few), 0, 1)), sorted(texts[:99]), strict=True)
    assert all(whole.startswith(part) and len(part) < len(whole) for part, whole in halves)
    assert len(list(open_validation(config(few)))) == 99


def test_a_fraction_that_leaves_hardly_a_document_takes_the_end_of_each(tmp_path: Path) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", [text(i, 300) for i in range(40)]), fraction=0.99)
    assert len(list(open_training(data, 0, epochs=1))) == len(list(open_validation(data))) == 40


@pytest.mark.parametrize("count", [3, 200])
def test_every_reader_keeps_to_the_same_rule(tmp_path: Path, count: int) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", [text(i, 300) for i in range(count)]))
    training, validation = sorted(open_training(data, 5, 1)), sorted(open_validation(data))
    assert sorted(training_documents(data, seed=0)) == training, "a tokenizer's training text"
    parts = [list(open_training(data, 5, 1, part=part, parts=2)) for part in range(2)]
    assert sorted(parts[0] + parts[1]) == training
    reader = Reader(open_in_order(data), "training", PrepareConfig(), data.validation, seen=None)  # type: ignore[arg-type]
    prepared = [batch.texts for batch in reader]
    assert sorted(t for texts in prepared for t in texts["training"]) == training
    assert sorted(t for texts in prepared for t in texts["validation"]) == validation
    assert sum(map(len, training + validation)) == sum(len(text(i, 300)) for i in range(count))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_a_document_that_comes_again_and_again_is_not_searched_to_the_end(tmp_path: Path, fraction: float) -> None:
    """The last line, which is none, would end the reading."""
    path = write_jsonl(tmp_path / "a.jsonl", [text(1)] * 2000)
    path.write_text(path.read_text() + "{")
    data = config(path, fraction)
    training, validation = next(open_training(replace(data, block_documents=1), 0)), next(open_validation(data))
    assert training + validation == text(1)


def test_a_rule_is_kept(tmp_path: Path) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", [text(i) for i in range(50)]))
    stream = open_training(data, 0)
    assert stream.by_end
    state = stream.state_dict()
    other = open_training(data, 0, by_end=False)
    other.load_state_dict(state)
    assert other.by_end
    del state["by_end"]  # as of more documents, or of an earlier version
    stream.load_state_dict(state)
    assert not is_held_out(next(stream), 0.1)
    assert not stream.by_end


def test_validation_files_that_are_trained_on_are_reported(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(book(9))
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    trained = (str(tmp_path / "[ab].txt"),)
    for files, count in (((str(tmp_path),), 2), ((str(tmp_path / "link.txt"),), 1), ((str(tmp_path / "c.txt"),), 0)):
        validation = ValidationConfig(kind="files", files=files)
        lines = trained_on_too(DataConfig(source="files", files=trained, validation=validation))
        assert [line.startswith(f"data.validation.files: {count} of ") for line in lines] == [True] * bool(count)
    assert not trained_on_too(config(tmp_path))


def test_a_text_field_of_no_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    data = replace(config(tmp_path / "a.txt"), text_field="content")
    (line,) = unused_text_field(data)
    assert line.startswith("data.text_field = 'content': it changes nothing")
    assert not unused_text_field(config(tmp_path / "a.txt"))
    other = write_jsonl(tmp_path / "b.jsonl", ["one"], field="content")
    assert not unused_text_field(replace(data, files=(str(tmp_path),)))
    assert not unused_text_field(replace(data, validation=ValidationConfig(kind="files", files=(str(other),))))


def test_it_is_said(tmp_path: Path) -> None:
    few = config(write_jsonl(tmp_path / "few.jsonl", ["one", "two"]), fraction=0.02)
    many = config(write_jsonl(tmp_path / "many.jsonl", [text(i) for i in range(500)]), fraction=0.02)
    few_words = f"the last 2% of each document in {tmp_path}/few.jsonl"
    few_words += "; whole documents are held out where there are at least 500 different ones"
    assert held_out_lines(few) == [f"held out for validation: {few_words}"]
    assert held_out_lines(many) == [f"held out for validation: 2% of the documents in {tmp_path}/many.jsonl"]
    assert held_out_lines(few, [False])[0].startswith("held out for validation: 2% of the documents")


def test_nothing_is_lost_in_dividing() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        whole = "".join(draw.choices("ab \n\n", k=draw.randrange(1, 40)))
        training, held_out = divided(whole, draw.random(), by_end=True)
        assert training + held_out == whole
        assert training


def test_a_fraction_next_to_nothing_is_of_few_documents() -> None:
    assert are_few([], 1e-320, NO_RETRY)
