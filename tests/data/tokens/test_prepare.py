import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from data_samples import text, write_jsonl

import p828.data.tokens.prepare
import p828.data.tokens.text_reader
from p828.cli.main import dispatch
from p828.config import Config, DataConfig, PrepareConfig, TokenizerConfig, ValidationConfig
from p828.config.values import to_dict
from p828.data.retry import NO_RETRY
from p828.data.text.documents import is_held_out
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.data.tokens.filters import looks_like_code
from p828.data.tokens.format import Manifest, ShardEntry, check_shards, open_manifest
from p828.data.tokens.prepare import Preparation, prepare
from p828.data.tokens.read import Prepared
from p828.errors import ConfigError, DataError

SHARE = 0.2
ODD = ["short", "x" * 900, text(3), "%" * 300, ""]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    shards = [[text(100 * shard + i) for i in range(count)] for shard, count in enumerate((40, 3, 61))]
    shards.append(ODD)
    for number, shard in enumerate(shards):
        write_jsonl(tmp_path / "texts" / f"{number}.jsonl", shard)
    return [text for shard in shards for text in shard]


@pytest.fixture
def config(tmp_path: Path, texts: list[str]) -> Config:
    files = (str(tmp_path / "texts" / "*.jsonl"),)
    validation = ValidationConfig(fraction=SHARE)
    data = DataConfig(source="files", files=files, sequence_length=31, validation=validation)
    return Config(data=data, prepare=PrepareConfig(shard_tokens=900), tokenizer=TokenizerConfig(vocab_size=320))


def make(config: Config, directory: Path, tokenizer: Tokenizer) -> Manifest:
    return prepare(config, directory, tokenizer, lambda preparation: None)


def flat(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]


def stored(directory: Path, part: str) -> list[int]:
    manifest = open_manifest(directory)
    shards = manifest.training if part == "training" else manifest.validation
    return np.concatenate([np.fromfile(directory / f"{s.name}.tokens", manifest.dtype) for s in shards]).tolist()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "tokenizer.json"}


def test_the_shards_hold_every_documents_tokens(
    config: Config, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    kept = [text for text in texts if text]
    training = [text for text in kept if not is_held_out(text, SHARE)]
    validation = [text for text in kept if is_held_out(text, SHARE)]
    assert stored(tmp_path / "prepared", "training") == flat(training, tokenizer)
    assert stored(tmp_path / "prepared", "validation") == flat(validation, tokenizer)
    assert (manifest.dtype, len(manifest.training) > 2) == ("uint16", True)
    assert sum(shard.tokens for shard in manifest.training) == len(flat(training, tokenizer))
    counts = manifest.counts
    assert (counts["read"], counts["training"], counts["validation"]) == (len(kept), len(training), len(validation))
    assert manifest.tokenizer == tokenizer.fingerprint()
    assert make(config, tmp_path / "prepared", tokenizer) == manifest  # the second time it compares


def test_validation_text_of_its_own(config: Config, texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [text(900), text(901)])
    validation = ValidationConfig(kind="files", files=(str(own),))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=validation))
    make(config, tmp_path / "prepared", tokenizer)
    assert stored(tmp_path / "prepared", "training") == flat([text for text in texts if text], tokenizer)
    assert stored(tmp_path / "prepared", "validation") == flat([text(900), text(901)], tokenizer)


def test_what_is_left_out_is_counted(config: Config, texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    filters = PrepareConfig(min_characters=6, max_characters=800, drop_duplicates=True, only_code=True)
    manifest = make(dataclasses.replace(config, prepare=filters), tmp_path / "prepared", tokenizer)
    counts = manifest.counts
    ordinary = texts[: -len(ODD)]  # text(3) is a copy of one of them
    odd = [text for text in ordinary if not looks_like_code(text)]
    found = (counts["too_short"], counts["too_long"], counts["not_code"], counts["duplicate"])
    assert found == (1, 1, 1 + len(odd), 1)
    assert counts["training"] + counts["validation"] == counts["read"] - sum(found)
    kept = [text for text in ordinary if text not in odd and not is_held_out(text, SHARE)]
    assert stored(tmp_path / "prepared", "training") == flat(kept, tokenizer)


def test_a_large_vocabulary_takes_four_bytes(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    large = Tokenizer(tokenizer.inner, "<|endoftext|>")
    large.vocab_size = 2**16 + 1
    assert make(config, tmp_path / "prepared", large).dtype == "uint32"
    large.vocab_size = 2**16
    assert make(config, tmp_path / "other", large).dtype == "uint16"


RUN = """
import sys
import p828.data.tokens.prepare, p828.data.tokens.text_reader
p828.data.tokens.prepare.SAVE_EVERY, p828.data.tokens.text_reader.BATCH_DOCUMENTS = 0.0, 3
from p828.cli.main import dispatch
sys.exit(dispatch(["prepare", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_killed_at_any_moment_it_ends_with_the_same_files(
    config: Config, tmp_path: Path, packing: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p828.data.tokens.text_reader, "BATCH_DOCUMENTS", 3)
    values = to_dict(config)
    values["data"]["packing"], values["prepare"]["drop_duplicates"] = packing, True
    tokenizer.save(tmp_path / "own.json")
    values["tokenizer"]["name"] = str(tmp_path / "own.json")
    (tmp_path / "c.toml").write_text(tomli_w.dumps(values))

    def arguments(directory: Path) -> list[str]:
        return [str(tmp_path / "c.toml"), "--data.prepared", str(directory)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert dispatch(["prepare", *arguments(whole)]) == 0
    for moment in range(4):
        command = [sys.executable, "-c", RUN, *arguments(killed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before = stamp(killed)
        while process.poll() is None and stamp(killed) in (None, before):
            time.sleep(0.001)  # between two looks for a position later than the one before
        process.kill()
        process.communicate()
        if (killed / "manifest.json").exists():
            assert moment > 0, "the first process was not killed in time"
            break
    assert dispatch(["prepare", *arguments(killed)]) == 0
    assert contents(killed) == contents(whole)


def stamp(directory: Path) -> int | None:
    try:
        return (directory / "progress.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_other_settings_are_refused(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make(config, tmp_path / "prepared", tokenizer)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=63))
    make(longer, tmp_path / "prepared", tokenizer)  # concatenated, it serves any length
    other = dataclasses.replace(config, prepare=PrepareConfig(min_characters=3))
    with pytest.raises(ConfigError, match=r"prepare\.min_characters = 0, not 3"):
        make(other, tmp_path / "prepared", tokenizer)
    shorter = dataclasses.replace(config, data=dataclasses.replace(config.data, max_document_megabytes=2))
    with pytest.raises(ConfigError, match=r"data\.max_document_megabytes = 16, not 2"):
        make(shorter, tmp_path / "prepared", tokenizer)


def test_another_tokenizer_is_refused(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make(config, tmp_path / "prepared", tokenizer)
    other = train_tokenizer(TokenizerConfig(vocab_size=300), [text(1)])
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        Prepared.open(tmp_path / "prepared", other)


def both(manifest: Manifest) -> list[ShardEntry]:
    return [*manifest.training, *manifest.validation]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-8])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["training-00001.tokens", "training-00000.documents", "validation-00000.tokens"])
def test_a_damaged_shard_is_named(config: Config, tokenizer: Tokenizer, tmp_path: Path, name: str, how: str) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    known = check_shards(tmp_path / "prepared", both(manifest))
    damage(tmp_path / "prepared" / name, how)
    with pytest.raises(DataError, match=name):
        check_shards(tmp_path / "prepared", both(manifest), known)


def test_an_unchanged_shard_is_not_read_again(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    known = check_shards(tmp_path / "prepared", both(manifest))
    shard = tmp_path / "prepared" / "training-00000.tokens"
    before = shard.stat()
    damage(shard, "flipped")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check_shards(tmp_path / "prepared", both(manifest), known) == known
    with pytest.raises(DataError, match=r"training-00000\.tokens"):
        check_shards(tmp_path / "prepared", both(manifest))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format_version": 2}', json.dumps({"format_version": 1})])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        open_manifest(tmp_path)


class Interrupted(Exception):
    pass


def interrupted_prepare(config: Config, directory: Path, tokenizer: Tokenizer, save_every: float) -> None:
    """Ends after the second batch of three documents."""
    batches = iter((False, True))

    def interrupt(preparation: Preparation) -> None:
        if next(batches):
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p828.data.tokens.prepare, "SAVE_EVERY", save_every)
        patch.setattr(p828.data.tokens.text_reader, "BATCH_DOCUMENTS", 3)
        with pytest.raises(Interrupted):
            prepare(config, directory, tokenizer, interrupt)


def test_what_was_written_after_the_saved_position_is_forgotten(
    config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Also by a process that ends before it has read anything."""
    filters = dataclasses.replace(config, prepare=PrepareConfig(shard_tokens=900, drop_duplicates=True))
    make(filters, tmp_path / "whole", tokenizer)
    interrupted_prepare(filters, tmp_path / "interrupted", tokenizer, save_every=1e9)
    for _ in range(2):
        Preparation(filters, tmp_path / "interrupted", tokenizer, NO_RETRY)
    make(filters, tmp_path / "interrupted", tokenizer)
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("hashes.partial", b"12345678", r"hashes\.partial: changed since"),
        ("progress.json", b'{"settings": 1}', r"progress\.json: damaged"),
        ("progress.json", b"{", r"progress\.json: damaged"),
    ],
)
def test_what_an_interrupted_preparation_left_is_checked(
    config: Config, tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    filters = dataclasses.replace(config, prepare=PrepareConfig(drop_duplicates=True))
    interrupted_prepare(filters, tmp_path / "prepared", tokenizer, save_every=0.0)
    (tmp_path / "prepared" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        make(filters, tmp_path / "prepared", tokenizer)


@pytest.mark.parametrize(
    "key, value",
    [("dtype", "int4"), ("training", []), ("settings", []), ("counts", 3), ("training.name", "../../etc/passwd-00000")],
)
def test_a_manifest_with_a_wrong_field_is_refused(
    config: Config, tokenizer: Tokenizer, tmp_path: Path, key: str, value: object
) -> None:
    make(config, tmp_path / "prepared", tokenizer)
    path = tmp_path / "prepared" / "manifest.json"
    fields = json.loads(path.read_text())
    if key == "training.name":
        fields["training"][0]["name"] = value
    else:
        fields[key] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"manifest\.json: not a manifest"):
        open_manifest(tmp_path / "prepared")


def test_a_complete_directory_is_verified_where_nothing_can_be_written(
    config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = make(config, tmp_path / "prepared", tokenizer)
    before = contents(tmp_path / "prepared")
    (tmp_path / "prepared").chmod(0o555)
    try:
        assert make(config, tmp_path / "prepared", tokenizer) == manifest
        assert contents(tmp_path / "prepared") == before
    finally:
        (tmp_path / "prepared").chmod(0o755)
