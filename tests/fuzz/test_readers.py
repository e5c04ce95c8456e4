"""Whatever a file holds, its reader takes it or says in a line or two what is wrong, and takes no more memory for it.

Each test here is a target, to which `FUZZ_EXAMPLES` gives more examples (`make fuzz`).
"""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hostile import mutated_bytes, mutated_values, to_json
from hypothesis import given, settings
from hypothesis import strategies as st

from p828 import config as configuration
from p828.cli.main import dispatch
from p828.data.text.files import FileShard
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.directory import read_progress
from p828.data.tokens.format import Manifest, check_shards, open_manifest, write_sealed
from p828.data.tokens.read import Prepared
from p828.engine.deepspeed.settings import read_strictly
from p828.errors import ConfigError, DataError
from p828.runs import checkpoint, records
from p828.runs.manifest import describe, manifest_bytes
from p828.runs.tensors import TensorShard
from p828.train import checkpoint_writer
from runs import tiny_values, write_toml
from tokenizer_kinds import EOS, KINDS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
fuzzed = settings(max_examples=EXAMPLES)
NESTED_TOML: list[Callable[[str, int], str]] = [
    lambda key, depth: f"{key}{'.a' * depth} = 1",
    lambda key, depth: f"[{key}{'.a' * depth}]",
    lambda key, depth: f"{key} = {'[' * depth}{']' * depth}",
    lambda key, depth: f"{key} = 0x{'f' * depth}",
    lambda key, depth: f"{key} = '{'a' * depth}'",
    lambda key, depth: f"{key} = {'{a=' * depth}1{'}' * depth}",
]
TOKENIZERS = [make().to_str().encode() for make in KINDS.values()]
MOST_BYTES = 64 * 2**20  # that a reader may take for a small file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def prepared(place: Path) -> Path:
    """A directory of prepared data."""
    path = write_toml(place, data={"prepared": str(place / "prepared")})
    assert dispatch(["prepare", str(path)]) == 0
    return place / "prepared"


@pytest.fixture(scope="module")
def saved(place: Path) -> Path:
    """A checkpoint with whole tensors and shards."""
    tensors = {
        "model": {"a": torch.randn(4, 6), "b": TensorShard(torch.randn(12), 0, (3, 4))},
        "random": {"cpu": torch.zeros(16, dtype=torch.uint8)},
    }
    return checkpoint_writer.save(place / "checkpoints", 5, tensors, {"progress": {"step": 5}, "data": {"a": [1]}})


def answered(read: Callable[[], Any]) -> Any:
    """What is read, or None after an answer in a few short lines; any other error is a failure."""
    tracemalloc.start()
    try:
        return read()
    except (ConfigError, DataError) as error:
        message = str(error)
        assert 0 < len(message.splitlines()) <= 12
        assert len(message) < 20_000
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_BYTES


@fuzzed
@given(data=st.data())
def test_a_configuration(place: Path, data: st.DataObject) -> None:
    valid = tiny_values(place)
    path = place / "any.toml"
    kind = data.draw(st.sampled_from(["bytes", "values", "nested"]))
    if kind == "bytes":
        path.write_bytes(data.draw(mutated_bytes(tomli_w.dumps(valid).encode())))
    elif kind == "values":
        values = data.draw(mutated_values(valid))
        try:
            path.write_text(tomli_w.dumps(values))
        except (TypeError, ValueError, AttributeError):  # what TOML cannot say
            return
    else:
        key = data.draw(st.sampled_from(["name", "model.hidden_size", "data.files", "base", "wandb"]))
        depth = data.draw(st.integers(1, 100_000))
        way = data.draw(st.sampled_from(NESTED_TOML))
        path.write_text(way(key, depth))

    def read() -> None:
        configuration.validate(configuration.load(str(path)))

    answered(read)


@fuzzed
@given(data=st.data())
def test_a_deepspeed_file(place: Path, data: st.DataObject) -> None:
    path = place / "ds.json"
    valid = {"train_batch_size": "auto", "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    path.write_bytes(data.draw(mutated_values(valid).map(to_json) | mutated_bytes(to_json(valid))))
    answered(lambda: read_strictly(path))


@fuzzed
@given(data=st.data())
def test_a_manifest_of_prepared_data(place: Path, prepared: Path, data: st.DataObject) -> None:
    directory = place / "manifest"
    if not directory.exists():
        shutil.copytree(prepared, directory)
    valid = (prepared / "manifest.json").read_bytes()
    content = data.draw(mutated_values(json.loads(valid)).map(to_json) | mutated_bytes(valid))
    (directory / "manifest.json").write_bytes(content)
    tokenizer = Tokenizer.from_file(prepared / "tokenizer.json", "<|endoftext|>")

    def read() -> None:
        manifest = open_manifest(directory)
        for shard in (*manifest.training, *manifest.validation):
            assert (directory / shard.name).parent == directory
        opened = Prepared.open(directory, tokenizer)
        opened.validation_samples(4, 32)
        check_shards(directory, opened.manifest.training)
        opened.tokens("training").sample(0, 33, 0)

    answered(read)


@fuzzed
@given(data=st.data())
def test_shards_of_prepared_data_whatever_their_checksums_say(place: Path, prepared: Path, data: st.DataObject) -> None:
    """The files' own content, which someone may have summed anew."""
    directory = place / "shards"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(prepared, directory)
    manifest = open_manifest(directory)
    name = manifest.training[0].name + data.draw(st.sampled_from([".tokens", ".documents"]))
    content = bytearray((directory / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = 8 * data.draw(st.integers(0, len(content) // 8 - 1))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
    (directory / name).write_bytes(content)
    tokenizer = Tokenizer.from_file(prepared / "tokenizer.json", "<|endoftext|>")

    def read() -> None:
        tokens = Prepared.open(directory, tokenizer).tokens("training")
        for start in range(0, len(tokens), 33):
            row = tokens.sample(start, 33, 0)
            assert 0 <= row.tokens.min() <= row.tokens.max() < tokenizer.vocab_size
            assert row.document_ids.min() >= -1

    answered(read)


@fuzzed
@given(data=st.data())
def test_the_progress_of_a_preparation(place: Path, data: st.DataObject) -> None:
    path = place / "progress.json"
    tables = {key: {"epoch": 0} for key in ("settings", "position", "hashes", "training", "validation")}
    write_sealed(path, {"tokenizer": "", "reader": 0, "counts": [], "tokens": 0, **tables})
    valid = path.read_bytes()
    content = data.draw(mutated_values(json.loads(valid)).map(to_json) | mutated_bytes(valid))
    path.write_bytes(content)
    found = answered(lambda: read_progress(path))
    assert (found is not None) == (content == valid), "damage is found, and nothing else is"


@fuzzed
@given(data=st.data())
def test_a_tokenizer(place: Path, data: st.DataObject) -> None:
    valid = data.draw(st.sampled_from(TOKENIZERS))
    path = place / "tokenizer.json"
    path.write_bytes(data.draw(mutated_values(json.loads(valid)).map(to_json) | mutated_bytes(valid)))

    def read() -> None:
        tokenizer = Tokenizer.from_file(path, EOS)
        text = f"abc def {EOS}\n 数据"
        ids, counts = tokenizer.encode_counted([text])[0]
        assert all(0 <= number < tokenizer.vocab_size for number in ids)
        assert counts.sum() == len(text.encode())
        tokenizer.decode(ids)
        tokenizer.spelled_bytes(ids, np.zeros(len(ids), np.int32))

    answered(read)


@fuzzed
@given(data=st.data())
def test_records(place: Path, data: st.DataObject) -> None:
    path = place / "metrics.jsonl"
    valid = b"".join(
        to_json({"kind": "step", "step": step, "loss": "NaN", "load": [[1, 2]]}) + b"\n" for step in range(3)
    )
    values = mutated_values({"kind": "step", "step": 1, "load": [[1, 2]]}).map(lambda value: to_json(value) + b"\n")
    path.write_bytes(data.draw(values | mutated_bytes(valid)))
    answered(lambda: list(records.read(path)))


@fuzzed
@given(data=st.data())
def test_json_lines(place: Path, data: st.DataObject) -> None:
    path = place / "documents.jsonl"
    valid = {"text": "some text", "more": [1, {"text": 2}]}
    path.write_bytes(
        data.draw(mutated_values(valid).map(to_json) | mutated_bytes(to_json(valid) + b"\n" + to_json(valid)))
    )

    def read() -> None:
        for text in FileShard(str(path), "text").documents():
            text.encode()

    answered(read)


@fuzzed
@given(data=st.data())
def test_a_checkpoint_whose_bytes_changed(place: Path, saved: Path, data: st.DataObject) -> None:
    copied = copy_of(saved, place)
    path = copied / data.draw(st.sampled_from(sorted(file.name for file in saved.iterdir())))
    valid = path.read_bytes()
    content = data.draw(mutated_bytes(valid))
    path.write_bytes(content)
    found = answered(lambda: checkpoint.load(copied))
    assert (found is not None) == (content == valid), "damage is found, and nothing else is"


@fuzzed
@given(data=st.data())
def test_a_checkpoint_of_someone_who_means_it(place: Path, saved: Path, data: st.DataObject) -> None:
    """Every checksum is right."""
    copied = copy_of(saved, place)
    manifest = json.loads((saved / "manifest.json").read_bytes())
    del manifest["sha256"]
    kind = data.draw(st.sampled_from(["manifest", "state", "tensors", "metadata"]))
    if kind == "manifest":
        manifest = data.draw(mutated_values(manifest))
    elif kind == "state":
        (copied / "state.json").write_bytes(data.draw(mutated_values({"progress": {"step": 5}}).map(to_json)))
    else:
        path = copied / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if kind == "metadata":
            places = json.loads(header["__metadata__"]["fragments"])
            text = to_json(data.draw(mutated_values(places))).decode("utf-8", "replace")
            header["__metadata__"]["fragments"] = text
        else:
            header = data.draw(mutated_values(header))
        spelled = to_json(header)
        size = data.draw(st.just(len(spelled)) | st.sampled_from([0, 2**40, 2**64 - 1]))
        path.write_bytes(size.to_bytes(8, "little") + spelled + content[8 + length :])
    if kind != "manifest":
        manifest["files"] = {name: describe(copied / name) for name in manifest["files"]}
    try:
        (copied / "manifest.json").write_bytes(manifest_bytes(manifest))
    except TypeError:  # nested too deeply for the manifest's one spelling
        return
    answered(lambda: checkpoint.load(copied))


def copy_of(saved: Path, place: Path) -> Path:
    copied = place / "copies" / saved.name
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(saved, copied)
    return copied


READERS: dict[str, Callable[[Path], Any]] = {
    "any.toml": lambda path: configuration.load(str(path)),
    "ds.json": read_strictly,
    "manifest.json": lambda path: open_manifest(path.parent),
    "progress.json": read_progress,
    "tokenizer.json": lambda path: Tokenizer.from_file(path, "<|endoftext|>"),
}


@pytest.fixture
def endless(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a file of a terabyte of nothing."""

    def make(name: str) -> Path:
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_end_is_refused_at_once(endless: Callable[[str], Path], name: str) -> None:
    path = endless(name)
    with pytest.raises(ConfigError, match=r"more than [0-9,]+ bytes"):
        READERS[name](path)


def test_a_checkpoint_without_end_is_refused_at_once(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / saved.name)
    for name in ("manifest.json", "model.safetensors", "state.json"):
        with (tmp_path / saved.name / name).open("r+b") as file:
            file.truncate(2**40)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=name):
            checkpoint.load(tmp_path / saved.name)
        shutil.copy(saved / name, tmp_path / saved.name / name)


def test_nothing_that_is_loaded_is_a_pickle() -> None:
    """A pickle can run code; no reader here opens one."""
    source = Path(configuration.__file__).parents[1]
    for file in source.rglob("*.py"):
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text, file
        assert "allow_pickle" not in text, file
        assert "yaml.load(" not in text, file


def test_a_manifest_cannot_name_a_place_outside(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "prepared")
    path = tmp_path / "prepared" / "manifest.json"
    fields = json.loads(path.read_bytes())
    fields["training"][0]["name"] = "../training-00000"
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="a shard has another name"):
        open_manifest(tmp_path / "prepared")
    assert isinstance(open_manifest(prepared), Manifest)
