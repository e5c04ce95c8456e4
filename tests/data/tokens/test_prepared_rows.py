"""Rows of prepared data whose files change or cannot be read, and how ranks share their checks."""

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest
from data_samples import open_run_loader, text, write_jsonl

from p828.config import Config, DataConfig, PrepareConfig, TrainConfig, ValidationConfig
from p828.data.order import merged
from p828.data.retry import Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens import format as manifests
from p828.data.tokens import read
from p828.data.tokens.format import CHECKSUM, check_shards, open_manifest
from p828.data.tokens.prepare import prepare
from p828.data.tokens.read import Prepared, ShuffledTokenDataset, TokenDataset
from p828.errors import ConfigError, DataError, TransientReadError

LENGTH = 15


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_jsonl(tmp_path / "texts" / "a.jsonl", [text(i) for i in range(60)])
    data = DataConfig(
        source="files",
        files=(str(tmp_path / "texts" / "*.jsonl"),),
        sequence_length=LENGTH,
        prepared=str(tmp_path / "prepared"),
        validation=ValidationConfig(fraction=0.2),
    )
    return Config(data=data, train=TrainConfig(micro_batch_size=2), prepare=PrepareConfig(shard_tokens=600))


@pytest.fixture
def directory(config: Config, tokenizer: Tokenizer) -> Path:
    make(config, tokenizer)
    return Path(config.data.prepared)


def make(config: Config, tokenizer: Tokenizer, retry: Retry | None = None) -> None:
    prepare(config, Path(config.data.prepared), tokenizer, lambda preparation: None, retry or Retry())


@pytest.mark.parametrize("name", ["training-00000.tokens", "training-00000.documents"])
def test_a_shard_that_is_cut_while_it_is_read_is_reported(directory: Path, tokenizer: Tokenizer, name: str) -> None:
    rows = ShuffledTokenDataset(Prepared.open(directory, tokenizer), LENGTH, seed=0)
    rows.take(0, 1)
    content = (directory / name).read_bytes()
    os.truncate(directory / name, 8)
    before = rows.state_dict()
    with pytest.raises(TransientReadError, match=rf"{name}: damaged or changed: cut to 8 bytes"):
        rows.take(0, rows.samples_per_epoch)
    (directory / name).write_bytes(content)
    resumed = ShuffledTokenDataset(Prepared.open(directory, tokenizer), LENGTH, seed=0)
    resumed.load_state_dict(before)
    assert len(resumed.take(0, 5)) == 5


def test_a_failed_read_is_repeated(directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is opened again: on a network's file system it may be another."""
    whole = Prepared.open(directory, tokenizer).tokens("training").sample(0, 33, 0)
    failures, opened, told, pread = [2], [], [], os.pread

    def failing(descriptor: int, size: int, at: int) -> bytes:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(read, "open_regular", lambda path: opened.append(path) or path.open("rb", buffering=0))
    retry = Retry(2, pause=lambda seconds: None, report=told.append)
    row = Prepared.open(directory, tokenizer).tokens("training", retry).sample(0, 33, 0)
    assert row.tokens.tolist() == whole.tokens.tolist()
    assert len(told) == 2
    assert "Stale file handle; attempt 2 of 3 in 1 s" in told[0]
    assert len(opened) == len(set(opened)) + 2
    failures[0] = 3
    with pytest.raises(TransientReadError, match="Stale file handle"):
        Prepared.open(directory, tokenizer).tokens("training", retry).sample(0, 33, 0)


def test_few_files_are_open_at_a_time(
    directory: Path, tokenizer: Tokenizer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MOST_OPEN", 3)
    tokens = Prepared.open(directory, tokenizer).tokens("training")
    assert len(open_manifest(directory).training) > 3
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, len(tokens) - 40, 40):
        tokens.sample(start, 40, 0)
        assert len(os.listdir("/proc/self/fd")) <= before + 6
    del tokens
    assert len(os.listdir("/proc/self/fd")) == before


def test_documents_are_found_between_those_in_memory(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(tokens: TokenDataset) -> list[tuple[list[int], list[int], int, int]]:
        found = [tokens.sample(start, 21, 0) for start in range(0, len(tokens), 7)]
        return [(r.tokens.tolist(), r.document_ids.tolist(), r.documents, r.split_documents) for r in found]

    prepared = Prepared.open(directory, tokenizer)
    expected = rows(prepared.tokens("training")), prepared.tokens("training").split_documents(16)
    monkeypatch.setattr("p828.data.tokens.read.INDEXED", 2)
    monkeypatch.setattr("p828.data.tokens.read.COUNTED_TOGETHER", 4)
    assert (rows(prepared.tokens("training")), prepared.tokens("training").split_documents(16)) == expected


def test_ranks_of_a_host_compare_each_file_once(config: Config, directory: Path, tokenizer: Tokenizer) -> None:
    opened = [open_run_loader(config, tokenizer, rank=r, world_size=3, part=(r, 3)).order for r in range(3)]
    states = []
    for rows in opened:
        next(rows)
        states.append(rows.state_dict())
    seen = [state["sources"][0]["checked"] for state in states]
    names = [s.name + ending for s in open_manifest(directory).training for ending in (".tokens", ".documents")]
    assert sorted(name for of_rank in seen for name in of_rank) == sorted(names)
    assert merged(states)["sources"][0]["checked"] == check_shards(directory, open_manifest(directory).training)
    flipped = bytearray((directory / names[1]).read_bytes())
    flipped[3] ^= 8
    (directory / names[1]).write_bytes(flipped)
    for rank in range(3):
        rows = open_run_loader(config, tokenizer, rank=rank, world_size=3, part=(rank, 3)).order
        rows.load_state_dict(merged(states))
        if names[1] in seen[rank]:
            with pytest.raises(DataError, match=names[1]):
                next(rows)
        else:
            next(rows)


def test_a_long_comparison_says_what_it_does(
    config: Config, directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, said, checksum_of = [], threading.Event(), manifests.checksum_of

    def report(line: str) -> None:
        told.append(line)
        said.set()

    def slow(path: Path) -> str:
        said.wait()
        return checksum_of(path)

    monkeypatch.setattr(manifests, "FIRST_WORD", 0.0)
    monkeypatch.setattr(manifests, "checksum_of", slow)
    make(config, tokenizer, Retry(report=report))
    assert told == [f"{directory}: comparing its files with their checksums: 0 of 10 done"]


def test_every_changed_byte_of_a_manifest_is_noticed(directory: Path) -> None:
    path = directory / "manifest.json"
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            open_manifest(directory)


def test_a_manifest_of_the_version_before_is_read(directory: Path, tokenizer: Tokenizer) -> None:
    path = directory / "manifest.json"
    fields = manifests.json.loads(path.read_bytes())
    del fields[CHECKSUM], fields["files"], fields["spells_text"]
    fields["format_version"] = 1
    validation = fields["settings"]["data"]["validation"]
    validation["share"] = validation.pop("fraction")
    path.write_text(manifests.json.dumps(fields, indent=1))
    manifest = open_manifest(directory)
    # What a checkpoint of that version holds, worked out as it was then.
    before = manifests.json.dumps(fields, sort_keys=True).encode()
    assert manifest.fingerprint() == manifests.xxhash.xxh3_128_hexdigest(before)
    assert len(Prepared.open(directory, tokenizer).tokens("training")) > 0


@pytest.mark.parametrize("change", ["new", "gone", "of another size"])
def test_other_files_of_the_source_are_noticed(
    config: Config, directory: Path, tmp_path: Path, tokenizer: Tokenizer, change: str
) -> None:
    other = tmp_path / "texts" / "b.jsonl"
    if change == "new":
        write_jsonl(other, ["another"])
    else:
        write_jsonl(other, ["one"])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(tmp_path / "two")))
        make(config, tokenizer)
        other.unlink() if change == "gone" else write_jsonl(other, ["longer"])
    with pytest.raises(ConfigError, match=rf"manifest\.json: .*: {change}: \S*b\.jsonl\.\nGive another directory"):
        make(config, tokenizer)


def test_rows_do_not_need_the_text(config: Config, directory: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "texts").rename(tmp_path / "away")
    with open_run_loader(config, tokenizer) as loader:
        assert next(loader).num_targets == 2 * LENGTH
