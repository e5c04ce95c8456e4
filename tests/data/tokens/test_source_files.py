import dataclasses
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import text, write_jsonl

from p828.config import Config, DataConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens import source_files
from p828.data.tokens.format import CHECKSUM, Manifest, write_sealed
from p828.data.tokens.prepare import prepare
from p828.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for number in range(3):
        write_jsonl(tmp_path / "texts" / f"{number}.jsonl", [text(50 * number + i) for i in range(50)])
    return Config(data=DataConfig(source="files", files=(str(tmp_path / "texts"),), sequence_length=31))


def make(config: Config, directory: Path, tokenizer: Tokenizer) -> Manifest:
    return prepare(config, directory, tokenizer, lambda preparation: None)


def edit(path: Path) -> None:
    """Another letter in the middle, of the same size."""
    content = bytearray(path.read_bytes())
    at = content.index(b'"text": "', len(content) // 2) + 10
    content[at] = ord("q") if content[at] != ord("q") else ord("z")
    path.write_bytes(content)


@pytest.mark.parametrize("most_named", [1000, 2])
def test_an_edit_of_the_same_size_is_noticed(
    config: Config, tmp_path: Path, tokenizer: Tokenizer, most_named: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "MOST_NAMED", most_named)
    manifest = make(config, tmp_path / "prepared", tokenizer)
    path = tmp_path / "texts" / "1.jsonl"
    os.utime(path)  # another time alone is no change
    assert make(config, tmp_path / "prepared", tokenizer) == manifest
    edit(path)
    named = f"of another content: {path}" if most_named > 2 else "a file's content is another"
    with pytest.raises(ConfigError, match=named):
        make(config, tmp_path / "prepared", tokenizer)


def test_moved_text_is_accepted(config: Config, tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    shutil.copytree(tmp_path / "texts", tmp_path / "copies", copy_function=shutil.copyfile)  # with times of their own
    shutil.rmtree(tmp_path / "texts")
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, files=(str(tmp_path / "copies"),)))
    assert make(moved, tmp_path / "prepared", tokenizer) == manifest
    edit(tmp_path / "copies" / "2.jsonl")
    with pytest.raises(ConfigError, match=r"made with data\.files = "):
        make(moved, tmp_path / "prepared", tokenizer)


def test_text_that_changes_while_it_is_read_is_not_taken_for_what_was_read(
    config: Config, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "texts" / "0.jsonl"
    prepare(config, tmp_path / "prepared", tokenizer, lambda preparation: edit(path))
    with pytest.raises(ConfigError, match="changed since the preparation began"):
        make(config, tmp_path / "prepared", tokenizer)


def test_an_interruption_while_checksums_are_made_keeps_the_tokens(
    config: Config, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(config, tmp_path / "whole", tokenizer)
    with monkeypatch.context() as interrupted:

        def interrupt(path: Path) -> str:
            raise KeyboardInterrupt

        interrupted.setattr(source_files, "checksum_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(config, tmp_path / "prepared", tokenizer)
    assert make(config, tmp_path / "prepared", tokenizer) == whole


def test_manifests_of_before_are_accepted(config: Config, tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    assert manifest.files is not None
    before = dataclasses.replace(manifest, files=dataclasses.replace(manifest.files, times="", contents=""))
    before.write(tmp_path / "prepared")
    path = tmp_path / "prepared" / "manifest.json"
    fields = json.loads(path.read_text())
    for key in ("times", "contents", "checksums"):
        del fields["files"][key]
    write_sealed(path, {key: value for key, value in fields.items() if key != CHECKSUM}, 1)
    edit(tmp_path / "texts" / "1.jsonl")  # which they do not tell
    assert make(config, tmp_path / "prepared", tokenizer).files == dataclasses.replace(
        manifest.files, times="", contents="", checksums={}
    )


def test_a_shard_of_a_local_data_set_is_known_by_its_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(2):
        table = pyarrow.table({"text": [text(50 * number + i) for i in range(50)]})
        (tmp_path / "hub").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / f"train-{number}.parquet", compression="none")
    config = Config(data=DataConfig(source="hf", hub_name=str(tmp_path / "hub"), sequence_length=31))
    make(config, tmp_path / "prepared", tokenizer)
    make(config, tmp_path / "prepared", tokenizer)
    path = tmp_path / "hub" / "train-1.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"of another content: .*hub split train shard 2 of 2"):
        make(config, tmp_path / "prepared", tokenizer)
