import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p828.data.tokens import write as shard_writer
from p828.data.tokens.read import TokenDataset
from p828.data.tokens.write import BestFitWriter, Document, ShardWriter

EOS = 0
ROW = 16
UINT16 = np.dtype("<u2")


def documents(count: int, longest: int = 40) -> list[Document]:
    draw = random.Random(1)
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return [np.array([*draw.choices(range(1, 60_000), k=length), EOS]) for length in lengths]


def writer(directory: Path, best_fit: bool, state: dict[str, Any] | None = None) -> ShardWriter | BestFitWriter:
    shards = ShardWriter(directory, "training", UINT16, shard_tokens=300, state=state)
    return BestFitWriter(shards, ROW, state) if best_fit else shards


def read(directory: Path, written: ShardWriter | BestFitWriter) -> TokenDataset:
    return TokenDataset(directory, written.complete, UINT16, EOS, 2**16)


def test_what_is_written_reads_back_with_its_documents(tmp_path: Path) -> None:
    some = documents(80)
    written = writer(tmp_path, best_fit=False)
    written.write(some[:33])
    written.write(some[33:])
    written.close()
    tokens, flat = read(tmp_path, written), np.concatenate(some)
    assert all(entry.tokens >= 300 for entry in written.complete[:-1])
    assert sum(entry.documents for entry in written.complete) == 80
    assert len(tokens) == len(flat)
    number_of = np.repeat(np.arange(80), [len(document) for document in some])
    ends = np.cumsum([len(document) for document in some])
    for start in range(0, len(flat), 7):
        row = tokens.sample(start, 23, epoch=0)
        inside = slice(start, min(start + 23, len(flat)))
        size = inside.stop - start
        assert row.tokens[:size].tolist() == flat[inside].tolist()
        assert row.document_ids.tolist() == (number_of[inside] - number_of[start]).tolist() + [-1] * (23 - size)
        ended = [i for i, end in enumerate(ends) if start < end <= inside.stop]
        assert row.documents == len(ended)
        assert row.split_documents == sum(ends[i] - len(some[i]) < start for i in ended)


def test_split_documents_of_all_rows_are_counted(tmp_path: Path) -> None:
    for best_fit in (False, True):
        directory = tmp_path / str(best_fit)
        directory.mkdir()
        written = writer(directory, best_fit)
        written.write(documents(80))
        written.close()
        tokens = read(directory, written)
        rows = [tokens.sample(start, ROW, 0) for start in range(0, len(tokens), ROW)]
        assert tokens.split_documents(ROW) == sum(row.split_documents for row in rows)
        assert sum(row.documents for row in rows) == 80


def test_best_fit_keeps_what_fits_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "PACKED_ROWS", 8)
    some = documents(200, longest=ROW - 1)
    written = writer(tmp_path, best_fit=True)
    for i in range(0, 200, 9):
        written.write(some[i : i + 9])
    written.close()
    tokens = read(tmp_path, written)
    rows = [tokens.sample(start, ROW, 0) for start in range(0, len(tokens), ROW)]
    assert Counter(t for row in rows for t in row.tokens[row.document_ids >= 0].tolist()) == Counter(
        np.concatenate(some).tolist()
    )
    whole = {tuple(document.tolist()) for document in some}
    found = {tuple(row.tokens[row.document_ids == number].tolist()) for row in rows for number in set(row.document_ids)}
    assert len(whole - found) == tokens.split_documents(ROW)
    assert len(whole - found) < 0.15 * len(whole)


@pytest.mark.parametrize("best_fit", [False, True])
def test_an_interrupted_writer_leaves_the_same_files(
    tmp_path: Path, best_fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "PACKED_ROWS", 8)
    some = documents(120)
    for name, interruptions in (("whole", ()), ("pieces", (30, 60))):
        directory = tmp_path / name
        directory.mkdir()
        written, at = writer(directory, best_fit), 0
        while at < 120:
            if at % 30 == 0:
                state = written.state_dict()  # packs what waits, at the same places in both
                if at in interruptions:
                    written.write(some[at : at + 25])  # past the end of a shard
                    written = writer(directory, best_fit, state)
            written.write(some[at : at + 5])
            at += 5
        written.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) > 6
    assert {path.name: path.read_bytes() for path in (tmp_path / "pieces").iterdir()} == files


def test_long_documents_wait_in_a_file_of_their_own(tmp_path: Path) -> None:
    """The state stays small, and a writer that goes on from it writes the same shards."""
    draw, row_length = np.random.default_rng(1), 4097
    some = [np.append(draw.integers(1, 60_000, length), EOS) for length in draw.integers(5_000, 20_000, 400)]
    for name in ("whole", "pieces"):
        directory = tmp_path / name
        directory.mkdir()
        written = BestFitWriter(ShardWriter(directory, "training", UINT16, 10**9), row_length)
        for at in range(0, 400, 50):
            written.write(some[at : at + 50])
            if name == "pieces":
                state = json.loads(json.dumps(written.state_dict()))
                written.saved()
                assert len(json.dumps(state)) < 1000
                written = BestFitWriter(ShardWriter(directory, "training", UINT16, 10**9, state), row_length, state)
        written.close()
    files, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("training-0*")} for name in ("pieces", "whole")
    )
    assert sum(map(len, some)) > shard_writer.PACKED_ROWS * row_length
    assert files == expected
    assert sum(len(content) for name, content in files.items() if name.endswith(".tokens")) == 2 * sum(map(len, some))
