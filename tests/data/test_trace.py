"""Every document of every row is found again where the row says it is: the oracle reads the file itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import open_run_loader, text, write_jsonl

from conversations import chat_config
from p828.config import Config, DataConfig, PrepareConfig, TrainConfig, ValidationConfig
from p828.data.batch import PADDING, Batch, DocumentPlace, Sample
from p828.data.build import tokenizer_of
from p828.data.loader import make_batch, open_loader
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.prepare import prepare
from p828.data.trace import TracedRow, longest_repeat, named, traced_rows

LENGTH = 31
DOCUMENTS = 60


def config_of(tmp_path: Path, **data: object) -> Config:
    for file in range(2):
        texts = [text(i) if i % 5 else "" for i in range(file, DOCUMENTS, 2)]  # numbers count empty ones, too
        write_jsonl(tmp_path / "texts" / f"{file}.jsonl", texts)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [text(DOCUMENTS)])
    fields: dict[str, object] = {
        "source": "files", "files": (str(tmp_path / "texts" / "*.jsonl"),), "sequence_length": LENGTH,
        "block_documents": 7, "shuffle_rows": 5, "validation": ValidationConfig(kind="files", files=(str(held_out),)),
    }  # fmt: skip
    return Config(data=DataConfig(**{**fields, **data}), train=TrainConfig(micro_batch_size=3, gradient_accumulation=1))


def parts_of(batch: Batch) -> list[tuple[str, int, int, list[int]]]:
    """Shard, record, tokens before and tokens of each document of the rows."""
    found = []
    for (_, places), tokens_S, ids_S in zip(batch.places, batch.tokens_BS, batch.document_ids_BS, strict=True):
        assert len(places) >= int(ids_S.max()) + 1, "a place for each document"
        found += [(*place, tokens_S[ids_S == number].tolist()) for number, place in enumerate(places)]
    return found


@pytest.mark.parametrize(
    "data",
    [{}, {"streams": 3}, {"packing": "best_fit"}, {"packing": "best_fit", "streams": 2}],
    ids=["concatenate", "streams of every third document", "best_fit", "best_fit and streams"],
)
def test_a_text_is_found_in_its_file(tmp_path: Path, tokenizer: Tokenizer, data: dict[str, object]) -> None:
    config = config_of(tmp_path, **data)
    seen = set()
    with open_run_loader(config, tokenizer) as loader:
        for _ in range(40):  # some epochs
            for shard, record, start, tokens in parts_of(next(loader)):
                line = Path(shard).read_text().splitlines()[record]
                whole = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id]
                assert tokens == whole[start : start + len(tokens)]
                seen.add((shard, record))
    assert len(seen) > DOCUMENTS // 2, "all over the files"


def test_places_are_the_same_after_a_resume(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = config_of(tmp_path)
    with open_run_loader(config, tokenizer) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state_dict()
        expected = [next(loader).places for _ in range(5)]
    with open_run_loader(config, tokenizer) as resumed:
        resumed.load_state_dict(state)
        assert [next(resumed).places for _ in range(5)] == expected


def test_a_conversation_is_found_in_its_file(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    tokenizer = tokenizer_of(config)
    with open_loader(config.data, config.train, tokenizer, config.model.mask_documents) as loader:
        for _ in range(8):
            for shard, record, start, tokens in parts_of(next(loader)):
                said = json.loads(Path(shard).read_text().splitlines()[record])["messages"][-1]["content"]
                assert start == 0
                assert said in tokenizer.decode(tokens)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_prepared_tokens_are_found_in_their_shard(tmp_path: Path, tokenizer: Tokenizer, packing: str) -> None:
    config = config_of(tmp_path, packing=packing, prepared=str(tmp_path / "prepared"))
    config = Config(data=config.data, train=config.train, prepare=PrepareConfig(shard_tokens=300))
    prepare(config, tmp_path / "prepared", tokenizer, lambda preparation: None)
    shards = set()
    with open_run_loader(config, tokenizer) as loader:
        for _ in range(20):
            for shard, record, start, tokens in parts_of(next(loader)):
                ends = np.fromfile(f"{shard}.documents", "<u8") // 2
                begin = int(ends[record - 1]) if record else 0
                whole = np.fromfile(f"{shard}.tokens", "<u2")[begin : int(ends[record])]
                assert tokens == whole[start : start + len(tokens)].tolist()
                shards.add(shard)
    assert len(shards) > 3


def test_a_row_is_told_in_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = config_of(tmp_path)
    with open_run_loader(config, tokenizer) as loader:
        batch = next(loader)
    rows = traced_rows([batch], ["files"], tokenizer)
    assert [row.source for row in rows] == ["files"] * 3
    for row, tokens_S, ids_S in zip(rows, batch.tokens_BS, batch.document_ids_BS, strict=True):
        assert sum(document.tokens for document in row.documents) == int((ids_S != PADDING).sum())
        first = tokenizer.decode(tokens_S[ids_S == 0].tolist())
        assert " ".join(first.split()).startswith(row.documents[0].text)
    assert f"{rows[0].documents[0].shard}, document {rows[0].documents[0].record}" in rows[0].in_words()


def traced(tokens: list[list[int]], tokenizer: Tokenizer) -> list[TracedRow]:
    """Rows of a document each, `file0` and so on."""
    samples = [
        Sample(np.array(row), np.zeros(len(row), np.int32), places=(DocumentPlace(f"file{i}", 0, 0),))
        for i, row in enumerate(tokens)
    ]
    return traced_rows([make_batch(samples[:2], True), make_batch(samples[2:], True)], ["files"], tokenizer)


def test_what_is_odd_is_named_first(tokenizer: Tokenizer) -> None:
    """A row that repeats itself, then the tokens that no other row has."""
    plain = [7, 8, 9, 10] * 10
    rows = traced([plain, plain, [*plain[:-6], 30, 31, 32, 33, 34, 35], [7] * 40, [*plain[:-2], 36, 36]], tokenizer)
    assert [row.documents[0].rare_tokens for row in rows] == [0, 0, 5, 0, 1]  # the last token is only predicted
    assert [row.repeats for row in rows] == [9, 9, 8, 39, 9]
    said = named(rows, most=3)
    assert said.startswith("1 of 5 rows repeat an n-gram 32 times or more; files: file3, document 0")
    assert said.index("file3") < said.index("file2") < said.index("file4") < said.index("and 2 more documents")


@pytest.mark.parametrize("seed", range(20))
def test_repeats_are_counted_as_a_loop_counts_them(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 3, 60)
    n, times = int(draw.integers(1, 14)), int(draw.integers(1, 20))
    tokens = np.concatenate([tokens, np.tile(draw.integers(0, 50, n), times), tokens])
    expected = 1
    for size in range(1, 14):
        for at in range(len(tokens) - size + 1):
            gram, count = tokens[at : at + size].tolist(), 1
            while tokens[at + count * size : at + (count + 1) * size].tolist() == gram:
                count += 1
            expected = max(expected, count)
    assert longest_repeat(tokens) == expected
