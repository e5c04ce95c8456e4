import random
from collections import Counter
from pathlib import Path

import pytest
from data_samples import text, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from p828.config import DataConfig, ValidationConfig
from p828.data.batch import PADDING
from p828.data.best_fit import best_fit
from p828.data.text import packing
from p828.data.text.documents import DocumentStream
from p828.data.text.open import open_training
from p828.data.text.packing import BestFitPacker
from p828.data.tokenizer.tokenizer import Tokenizer

LENGTH = 31


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(2, 40))
def test_every_token_has_one_place_in_full_rows(lengths: list[int], row_length: int) -> None:
    rows = best_fit(lengths, row_length)
    sizes = [sum(end - start for _, start, end in row) for row in rows]
    assert all(size == row_length for size in sizes[:-1])
    assert all(0 < size <= row_length for size in sizes[-1:])
    placed = sorted((document, token) for row in rows for document, start, end in row for token in range(start, end))
    assert placed == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


def test_few_documents_are_cut_that_a_row_could_hold() -> None:
    draw = random.Random(0)
    lengths = [min(int(draw.lognormvariate(5.5, 1.0)) + 1, 20_000) for _ in range(3000)]
    pieces = Counter(document for row in best_fit(lengths, 2049) for document, _, _ in row)
    cut = [document for document, count in pieces.items() if count > 1]
    fitting = [document for document in cut if lengths[document] <= 2049]
    assert all(length <= 2049 or document in cut for document, length in enumerate(lengths))
    assert len(fitting) < 0.01 * len(lengths)


def test_documents_that_fit_exactly_are_all_whole() -> None:
    assert sorted(best_fit([7, 3, 5, 5, 10, 4, 6], 10)) == sorted(
        [[(4, 0, 10)], [(0, 0, 7), (1, 0, 3)], [(6, 0, 6), (5, 0, 4)], [(2, 0, 5), (3, 0, 5)]]
    )


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for shard, count in enumerate((30, 7, 25)):
        write_jsonl(tmp_path / f"{shard}.jsonl", [text(100 * shard + i) for i in range(count)])
    validation = ValidationConfig(kind="files", files=("unused",))
    return DataConfig(source="files", files=(str(tmp_path / "*.jsonl"),), block_documents=8, validation=validation)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_ROWS", 12)
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 4)


def packer(config: DataConfig, tokenizer: Tokenizer, epochs: int | None = 2) -> BestFitPacker:
    return BestFitPacker(open_training(config, seed=1, epochs=epochs), tokenizer, LENGTH)


def documents(config: DataConfig, tokenizer: Tokenizer) -> list[list[int]]:
    stream: DocumentStream = open_training(config, seed=1, epochs=1)
    return [[*tokenizer.encode(document), tokenizer.eos_id] for document in stream]


def test_every_token_once_an_epoch(config: DataConfig, tokenizer: Tokenizer) -> None:
    seen = [Counter[int](), Counter[int]()]
    padded = 0
    for row in packer(config, tokenizer):
        assert len(row.tokens) == LENGTH + 1
        seen[row.epoch].update(row.tokens[row.document_ids != PADDING].tolist())
        padded += PADDING in row.document_ids
    expected = Counter(token for document in documents(config, tokenizer) for token in document)
    assert seen == [expected, expected]
    assert padded <= 2 * (expected.total() // (12 * (LENGTH + 1)) + 1)


def test_a_resume_at_any_row_gives_the_same_rows(config: DataConfig, tokenizer: Tokenizer) -> None:
    whole, states = packer(config, tokenizer), []
    rows = []
    for row in whole:
        rows.append(row.tokens.tolist())
        states.append(whole.state_dict())
    for at in range(0, len(rows), 3):
        resumed = packer(config, tokenizer)
        resumed.load_state_dict(states[at])
        assert [row.tokens.tolist() for row in resumed] == rows[at + 1 :]


def test_split_documents_are_counted(config: DataConfig, tokenizer: Tokenizer) -> None:
    rows = list(packer(config, tokenizer, epochs=1))
    whole = {tuple(document) for document in documents(config, tokenizer)}
    found = set()
    for row in rows:
        for number in range(max(row.document_ids) + 1):
            found.add(tuple(row.tokens[row.document_ids == number].tolist()))
    assert sum(row.documents for row in rows) == len(whole)  # each begins with its number, so none is another's copy
    assert sum(row.split_documents for row in rows) == len(whole - found)
