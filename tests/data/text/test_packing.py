import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_samples import text, write_jsonl

from p828.config import DataConfig, ValidationConfig
from p828.data.batch import Sample
from p828.data.text import packing
from p828.data.text.documents import DocumentStream
from p828.data.text.open import open_training
from p828.data.text.packing import Packer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError

LENGTH = 31


def stream(tmp_path: Path, documents: int = 40, epochs: int | None = None) -> DocumentStream:
    if not tmp_path.joinpath("a.jsonl").exists():
        for i, name in enumerate("abcd"):
            write_jsonl(tmp_path / f"{name}.jsonl", [text(k) for k in range(i, documents, 4)])
    config = DataConfig(
        source="files",
        files=(str(tmp_path / "*.jsonl"),),
        block_documents=7,
        validation=ValidationConfig(kind="files", files=("none",)),
    )
    return open_training(config, seed=2, epochs=epochs)


@pytest.fixture(params=[3, 256])
def batch_documents(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few documents tokenized together, so that rows span batches; and all at once."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", request.param)
    size: int = request.param
    return size


def all_rows(packer: Packer) -> list[Sample]:
    rows = list(packer)
    rest = packer.remainder()
    return rows if rest is None else [*rows, rest]


def same(one: list[Sample], other: list[Sample]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.document_ids, b.document_ids)
        for a, b in zip(one, other, strict=True)
    )


def test_every_token_comes_once_in_order(tmp_path: Path, tokenizer: Tokenizer, batch_documents: int) -> None:
    expected, document = [], []
    for number, words in enumerate(stream(tmp_path, epochs=2)):
        ids = [*tokenizer.encode(words), tokenizer.eos_id]
        expected += ids
        document += [number] * len(ids)
    rows = all_rows(Packer(stream(tmp_path, epochs=2), tokenizer, LENGTH))
    assert np.concatenate([row.tokens for row in rows]).tolist() == expected
    assert {len(row.tokens) for row in rows[:-1]} == {LENGTH + 1}
    assert len(rows) == -(-len(expected) // (LENGTH + 1))
    for i, row in enumerate(rows):
        numbers = np.array(document[i * (LENGTH + 1) : (i + 1) * (LENGTH + 1)])
        assert row.document_ids.tolist() == (numbers - numbers[0]).tolist()
        assert row.tokens.dtype == np.int64
        assert row.document_ids.dtype == np.int32


def test_nothing_is_left_when_the_rows_come_out_even(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = sum(len(tokenizer.encode(words)) + 1 for words in stream(tmp_path, epochs=1))
    packer = Packer(stream(tmp_path, epochs=1), tokenizer, tokens - 1)
    assert len(list(packer)) == 1
    assert packer.remainder() is None


def test_resume_is_exact_at_every_row(tmp_path: Path, tokenizer: Tokenizer, batch_documents: int) -> None:
    whole = all_rows(Packer(stream(tmp_path, epochs=3), tokenizer, LENGTH))
    packer = Packer(stream(tmp_path, epochs=3), tokenizer, LENGTH)
    states = [packer.state_dict()]
    for _ in packer:
        states.append(packer.state_dict())
    assert len(states) > 60
    draw = random.Random(0)
    for stop in {0, len(states) - 1, *draw.sample(range(len(states)), 20)}:
        state = states[stop]
        second = Packer(stream(tmp_path, epochs=3), tokenizer, LENGTH)
        second.load_state_dict(json.loads(json.dumps(state)))
        assert second.state_dict() == state
        again = draw.randint(0, len(states) - 1 - stop)
        given = [next(second) for _ in range(again)]
        assert second.state_dict() == states[stop + again]
        third = Packer(stream(tmp_path, epochs=3), tokenizer, LENGTH)
        next(third)  # what it gave before loading leaves no trace
        third.load_state_dict(json.loads(json.dumps(second.state_dict())))
        assert same(given + all_rows(third), whole[stop:])


def test_one_document_over_many_rows_resumes_inside(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", [text(1, 5), "word " * 500, text(2, 5)])
    whole = all_rows(Packer(stream(tmp_path, epochs=1), tokenizer, LENGTH))
    packer = Packer(stream(tmp_path, epochs=1), tokenizer, LENGTH)
    for _ in range(len(whole) // 2):
        next(packer)
    state = packer.state_dict()
    assert state["tokens"] > LENGTH
    resumed = Packer(stream(tmp_path, epochs=1), tokenizer, LENGTH)
    resumed.load_state_dict(state)
    assert same(all_rows(resumed), whole[len(whole) // 2 :])


def test_data_shorter_than_one_row(tmp_path: Path, tokenizer: Tokenizer, batch_documents: int) -> None:
    tokens = sum(len(tokenizer.encode(words)) + 1 for words in stream(tmp_path, epochs=1))
    row = next(Packer(stream(tmp_path), tokenizer, tokens - 1))
    assert len(row.tokens) == tokens
    with pytest.raises(
        DataError, match=rf"data\.sequence_length = {tokens}: data\.files = .* has {tokens} tokens in all"
    ):
        next(Packer(stream(tmp_path), tokenizer, tokens))
