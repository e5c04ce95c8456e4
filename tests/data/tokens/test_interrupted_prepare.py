"""What an interrupted preparation left, changed by something else before it goes on."""

import dataclasses
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import text, write_jsonl

import p828.data.tokens.prepare
import p828.data.tokens.text_reader
from p828.config import Config, DataConfig, PrepareConfig, ValidationConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens import directory as prepared_directory
from p828.data.tokens import write as shard_writer
from p828.data.tokens.directory import open_output_dirs, read_progress
from p828.data.tokens.format import open_manifest
from p828.data.tokens.prepare import prepare
from p828.errors import ConfigError, RunFailed


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_jsonl(tmp_path / "text.jsonl", [text(i) for i in range(60)])
    data = DataConfig(
        source="files",
        files=(str(tmp_path / "*.jsonl"),),
        sequence_length=15,
        packing="best_fit",
        validation=ValidationConfig(fraction=0.2),
    )
    return Config(data=data, prepare=PrepareConfig(shard_tokens=600, drop_duplicates=True))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p828.data.tokens.text_reader, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(shard_writer, "PACKED_ROWS", 40)


def make(config: Config, directory: Path, tokenizer: Tokenizer, batches: int = 10**9) -> None:
    """End by an error after so many batches."""

    def interrupt(preparation: object) -> None:
        nonlocal batches
        batches -= 1
        if not batches:
            raise KeyboardInterrupt

    prepare(config, directory, tokenizer, interrupt)


@pytest.fixture
def interrupted(config: Config, tmp_path: Path, tokenizer: Tokenizer) -> Path:
    with pytest.raises(KeyboardInterrupt):
        make(config, tmp_path / "interrupted", tokenizer, batches=8)
    return tmp_path / "interrupted"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_it_left_is_enough_to_go_on(
    config: Config, interrupted: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    names = contents(interrupted)
    assert {"progress.json", "hashes.partial"} < names.keys()
    assert any(re.fullmatch(r"training-waiting-\d+\.partial", name) and content for name, content in names.items())
    assert any(re.fullmatch(r"training-\d{5}\.tokens", name) for name in names)
    make(config, tmp_path / "whole", tokenizer)
    make(config, interrupted, tokenizer)
    assert contents(interrupted) == contents(tmp_path / "whole")


def test_every_changed_byte_is_noticed(config: Config, interrupted: Path, tokenizer: Tokenizer) -> None:
    before = contents(interrupted)
    changed = 0
    for name, content in before.items():
        if name.endswith((".tokens", ".documents")):
            continue  # complete: what their checksums in the manifest are for
        for at in range(0, len(content), 1 if name == "progress.json" else 29):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            (interrupted / name).write_bytes(damaged)
            read = read_progress if name == "progress.json" else lambda path: make(config, path.parent, tokenizer)
            with pytest.raises(ConfigError) as error:
                read(interrupted / name)
            assert name in str(error.value)
            assert len(str(error.value).splitlines()) == 1
            changed += 1
        (interrupted / name).write_bytes(content)
    assert changed > 1500
    assert contents(interrupted) == before


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_file_that_is_cut_or_gone_is_named_and_nothing_written(
    config: Config, interrupted: Path, tokenizer: Tokenizer, how: str
) -> None:
    for name, content in contents(interrupted).items():
        if not content or name == "progress.json":  # without which nothing was begun
            continue
        (interrupted / name).unlink()
        if how == "cut":
            (interrupted / name).write_bytes(content[:-1])
        before = contents(interrupted)
        with pytest.raises(ConfigError, match=re.escape(name)):
            make(config, interrupted, tokenizer)
        assert contents(interrupted) == before
        (interrupted / name).write_bytes(content)


def put_link(path: Path) -> None:
    (path.parent.parent / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parent.parent / "outside")


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_socket(path: Path) -> None:
    path.unlink()
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # a socket's path may have a hundred bytes only
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.fchdir(here)
    os.close(here)


@pytest.mark.parametrize("put", [put_link, put_fifo, put_directory, put_socket])
@pytest.mark.parametrize(
    "pattern",
    ["progress.json", "hashes.partial", "training-*.tokens.partial", "training-waiting-*.partial", "*.tokens"],
)
def test_only_regular_files_are_gone_on_with(
    config: Config, interrupted: Path, tokenizer: Tokenizer, put: Callable[[Path], None], pattern: str
) -> None:
    (path,) = list(interrupted.glob(pattern))[:1]
    content = path.read_bytes()
    put(path)
    if put is put_link and not pattern.endswith(".partial"):
        make(config, interrupted, tokenizer)  # it is read, and what is written takes its place
    else:
        with pytest.raises(ConfigError, match=re.escape(path.name)):
            make(config, interrupted, tokenizer)
    if put is put_link:
        assert (interrupted.parent / "outside").read_bytes() == content


@pytest.mark.parametrize("put", [put_fifo, put_directory, put_socket])
@pytest.mark.parametrize("name", ["manifest.json", "progress.json", ".lock"])
def test_a_directory_of_odd_files_is_answered(
    tmp_path: Path, config: Config, put: Callable[[Path], None], name: str
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / name).touch()
    put(tmp_path / "odd" / name)
    directories = [tmp_path / "odd"]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(directories[0])))

    def settle() -> None:
        with open_output_dirs(directories):
            prepared_directory.resolve_tokenizer(config, directories, lambda: [text(1)])

    with pytest.raises(ConfigError, match=re.escape(name)):
        settle()


def test_what_killed_processes_left_is_swept(
    config: Config, interrupted: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name in (".progress.json.tmp", ".manifest.json.tmp", ".tokenizer.json.tmp", ".tried.partial"):
        (interrupted / name).write_text("half")
    with open_output_dirs([interrupted]):
        make(config, interrupted, tokenizer)
    assert not [name for name in os.listdir(interrupted) if name.startswith(".") and name != ".lock"]
    for name in ("progress.json", "hashes.partial", "training-waiting-3.partial"):  # killed after the manifest
        (interrupted / name).write_text("left")
    with open_output_dirs([interrupted]):
        assert not [name for name in os.listdir(interrupted) if name.endswith(".partial") or name == "progress.json"]
    begun = tmp_path / "begun"  # killed before the first position
    begun.mkdir()
    for name in ("hashes.partial", "training-00000.tokens.partial", ".progress.json.tmp"):
        (begun / name).touch()
    with open_output_dirs([begun]):
        make(config, begun, tokenizer)
    open_manifest(begun)


def test_a_file_system_that_cannot_rename_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    with (
        pytest.raises(ConfigError, match="prepared: files cannot be appended to, shortened and renamed"),
        open_output_dirs([tmp_path / "new" / "prepared"]),
    ):
        raise AssertionError("it went on")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("holds, stays", [("training-00000.tokens.partial", True), ("hashes.partial", False)])
def test_only_what_is_of_no_value_is_removed(tmp_path: Path, holds: str, stays: bool) -> None:
    """By a command that ends with wrong input; what was there before stays in any case."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".own").touch()
    directories = [tmp_path / "there", tmp_path / "new" / "prepared"]

    def fail() -> None:
        with open_output_dirs(directories):
            for directory in directories:
                (directory / holds).write_bytes(b"12")
            raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        fail()
    assert (tmp_path / "there" / ".own").exists()
    assert (tmp_path / "there" / holds).exists() == stays
    assert (tmp_path / "new").exists() == stays


def test_any_number_of_shards_fits_the_manifest(
    config: Config, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They become larger."""
    monkeypatch.setattr(shard_writer, "SHARDS_OF_A_SIZE", 2)
    config = dataclasses.replace(config, prepare=PrepareConfig(shard_tokens=100))
    make(config, tmp_path / "prepared", tokenizer)
    shards = open_manifest(tmp_path / "prepared").training
    assert len(shards) > 5
    longest = 16  # documents are cut in rows
    for number, shard in enumerate(shards[:-1]):
        assert 100 * 2 ** (number // 2) <= shard.tokens < 100 * 2 ** (number // 2) + longest


def test_text_that_changed_meanwhile_is_said_once(
    config: Config, interrupted: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(text.read_bytes() + b"\n")
    with pytest.raises(ConfigError) as refused:
        make(config, interrupted, tokenizer)
    first, second = str(refused.value).splitlines()
    assert first.endswith("text.jsonl changed or is another one.")
    assert second == f"Put the files back as they were, or remove {interrupted} to begin again"
    assert "checkpoint" not in first


def test_an_error_at_work_saves_what_is_written(
    config: Config, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed line, mended, is gone on from."""
    path = tmp_path / "text.jsonl"
    make(config, tmp_path / "whole", tokenizer)
    good, found = path.read_bytes(), path.stat()
    lines = good.splitlines(keepends=True)
    lines[40] = lines[40].replace(b"}", b"!")
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunFailed, match=r"text\.jsonl:41: not a line of JSON.*\n.*the same command goes on from there"):
        make(config, tmp_path / "stopped", tokenizer)
    assert read_progress(tmp_path / "stopped" / "progress.json")["counts"][-1]["read"] >= 20
    path.write_bytes(good)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    make(config, tmp_path / "stopped", tokenizer)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_an_error_of_the_disk_keeps_the_position_before(
    config: Config, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p828.data.tokens.prepare, "SAVE_EVERY", 0.0)
    make(config, tmp_path / "whole", tokenizer)
    for blocked in ("training-00001.tokens", ".manifest.json.tmp"):
        directory = tmp_path / blocked
        (directory / blocked).mkdir(parents=True)
        with pytest.raises(RunFailed, match=re.escape(blocked) + r".*\n.*the same command goes on from there"):
            make(config, directory, tokenizer)
        (directory / blocked).rmdir()
        make(config, directory, tokenizer)
        assert contents(directory) == contents(tmp_path / "whole")
