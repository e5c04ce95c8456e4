"""Whether a state's shards are still what they were, and which one is not."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_samples import text, write_bytes, write_jsonl

from p828.config import DataConfig, PrepareConfig, ValidationConfig
from p828.data.text.documents import DocumentStream, _fingerprint
from p828.data.text.identities import Identities
from p828.data.text.open import open_in_order, open_training
from p828.data.text.shard import BadRecord
from p828.data.tokens.filters import SeenTexts
from p828.data.tokens.text_reader import Reader
from p828.errors import ConfigError, DataError

KEEP_ALL = ValidationConfig(kind="files", files=("none",))


def config(*globs: Path | str, **changes: Any) -> DataConfig:
    files = tuple(map(str, globs))
    return DataConfig(source="files", files=files, block_documents=4, validation=KEEP_ALL, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        write_jsonl(tmp_path / "here" / f"{i}.jsonl", [text(10 * i + k) for k in range(10)])
    return tmp_path / "here"


def stopped_state(stream: DocumentStream, count: int) -> tuple[list[str], dict[str, Any]]:
    given = [next(stream) for _ in range(count)]
    return given, json.loads(json.dumps(stream.state_dict()))


def test_files_that_were_moved_are_the_same(folder: Path) -> None:
    whole = list(open_training(config(folder / "*"), 1, epochs=2))
    _, state = stopped_state(open_training(config(folder / "*"), 1, epochs=2), 33)
    moved = folder.rename(folder.with_name("there"))
    for globs in ((moved / "*",), (moved,), tuple(sorted(moved.iterdir(), reverse=True))):
        stream = open_training(config(*globs), 1, epochs=2)
        stream.load_state_dict(state)
        assert list(stream) == whole[33:]


@pytest.mark.parametrize("change", ["longer", "beginning", "end", "renamed", "replaced"])
def test_a_changed_file_is_named(folder: Path, change: str) -> None:
    _, state = stopped_state(open_training(config(folder), 1), 7)
    path = folder / "3.jsonl"
    content = path.read_bytes()
    if change == "longer":
        path.write_bytes(content + b"\n")
    elif change == "beginning":
        path.write_bytes(content.replace(b'"id": 0', b'"id": 9'))
    elif change == "end":
        path.write_bytes(content[:-1] + b" ")
    elif change == "renamed":
        path.rename(folder / "3a.jsonl")
    else:
        write_jsonl(path, ["another"])
    with pytest.raises(
        ConfigError, match=r"not the data of the checkpoint: .*/3a?\.jsonl changed or is another one"
    ) as said:
        open_training(config(folder), 1).load_state_dict(state)
    assert "\n" not in str(said.value)


def test_new_and_missing_files_are_reported(folder: Path) -> None:
    _, state = stopped_state(open_training(config(folder), 1), 7)
    write_jsonl(folder / "7.jsonl", ["x"])
    write_jsonl(folder / "8.jsonl", ["y"])
    with pytest.raises(ConfigError, match=r"7\.jsonl \(and 1 more\) is new or changed\. .*or start a new run"):
        open_training(config(folder), 1).load_state_dict(state)
    for name in ("7.jsonl", "8.jsonl", "2.jsonl"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="it had 5 files or shards, and has 4"):
        open_training(config(folder), 1).load_state_dict(state)


def test_other_settings_are_told_from_other_files(folder: Path) -> None:
    _, state = stopped_state(open_training(config(folder), 1), 7)
    for stream in (open_training(config(folder), 2), open_training(config(folder), 1, part=0, parts=9)):
        with pytest.raises(ConfigError, match=r"data\.block_documents, data\.validation or train\.seed changed"):
            stream.load_state_dict(state)


def test_a_state_of_an_earlier_version_is_read(folder: Path) -> None:
    whole = list(open_training(config(folder), 1, epochs=1))
    stream = open_training(config(folder), 1, epochs=1)
    _, state = stopped_state(stream, 21)
    shards = [(shard.name, shard.size) for shard in stream.shards]
    old = {key: state[key] for key in ("epoch", "block", "shard", "record", "given")}
    old["source"] = _fingerprint([shards, 4, 1, 0.0, False], 8)
    again = open_training(config(folder), 1, epochs=1)
    again.load_state_dict(old)
    assert list(again) == whole[21:]
    write_jsonl(folder / "4.jsonl", ["x"])
    with pytest.raises(ConfigError, match="not the data of the checkpoint: its files"):
        open_training(config(folder), 1).load_state_dict(old)


def test_a_mended_file_goes_on_where_it_stopped(folder: Path) -> None:
    whole = list(open_training(config(folder), 1, epochs=1))
    path = folder / "2.jsonl"
    good = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*good[:6], '{"text": oops}\n', *good[6:]]))
    stream = open_training(config(folder), 1, epochs=1)
    given: list[str] = []
    states = [stream.state_dict()]
    with contextlib.suppress(BadRecord):
        for document in stream:
            given.append(document)
            states.append(stream.state_dict())
    with pytest.raises(BadRecord, match=r"2\.jsonl:7: not a line of JSON"):
        list(open_training(config(folder), 1, epochs=1))
    state = json.loads(json.dumps({**states[-1], "stopped": stream.stopped}))
    assert given == whole[: len(given)]

    refused = [
        ["changed before", *good[1:]],
        [*good[:5], '{"text": "mended"}\n', *good[6:]],
        good[:5],
    ]
    for lines in refused:
        path.write_text("".join(lines))
        with pytest.raises(ConfigError, match=r"2\.jsonl changed"):
            open_training(config(folder), 1, epochs=1).load_state_dict(state)
    path.write_text("".join(good))  # the line is left out
    again = open_training(config(folder), 1, epochs=1)
    again.load_state_dict(state)
    assert given + list(again) == whole
    with pytest.raises(ConfigError, match=r"2\.jsonl changed"):  # another state of the same place knows of no stop
        open_training(config(folder), 1, epochs=1).load_state_dict(states[-1])


BAD = {
    "not JSON": b"{oops\n",
    "no field": b'{"txt": "a"}\n',
    "no text": b'{"text": [1]}\n',
    "no object": b'"a"\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "too long": b'{"text": "' + b"x" * 1_000_001 + b'"}\n',
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_records_are_passed_over_and_counted(folder: Path, kind: str, ending: str) -> None:
    expected = list(open_training(config(folder / "*", max_document_megabytes=1), 1, epochs=1))
    lines = (folder / "1.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "1.jsonl").unlink()
    write_bytes(
        folder / f"1.jsonl{ending}", b"".join([BAD[kind], *lines[:4], BAD[kind], BAD[kind], *lines[4:], BAD[kind]])
    )
    skipping = config(folder / "*", bad_records="skip", max_document_megabytes=1)
    stream = open_training(skipping, 1, epochs=2)
    whole = list(stream)
    assert sorted(whole[:50]) == sorted(whole[50:]) == sorted(expected)
    assert stream.bad_records == 4, "each counts once"
    for stop in (0, 3, 20, 49, 50, 77, 100):
        _, state = stopped_state(open_training(skipping, 1, epochs=2), stop)
        again = open_training(skipping, 1, epochs=2)
        again.load_state_dict(state)
        assert list(again) == whole[stop:]
        assert again.bad_records == 4
    for parts in (2, 9):
        streams = [open_training(skipping, 1, epochs=1, part=part, parts=parts) for part in range(parts)]
        assert sorted(t for one in streams for t in one) == sorted(expected)
        assert sum(one.bad_records for one in streams) == 4
    with pytest.raises(BadRecord, match=r"1\.jsonl(\.gz)?:1: "):
        list(open_training(config(folder / "*", max_document_megabytes=1), 1, epochs=1))


def test_a_text_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text("b")
    stream = open_training(config(tmp_path, bad_records="skip"), 0, epochs=1)
    assert list(stream) == ["b"]
    assert stream.bad_records == 1
    only = open_training(config(tmp_path / "a.txt", bad_records="skip"), 0, epochs=1)
    with pytest.raises(DataError, match="all of it is bad records, 1 that were passed over"):
        next(only)


class Numbered:
    """A shard that is its number."""

    def __init__(self, number: int) -> None:
        self.name = str(number)

    def identity(self, with_contents: bool) -> str:
        return self.name

    def prefix(self, records: int) -> str:
        return ""


@pytest.mark.parametrize("count", [1, 100_000, 1_000_000])
def test_a_state_of_very_many_files_is_small(count: int) -> None:
    shards = [Numbered(i) for i in range(count)]
    identities = Identities(shards)  # type: ignore[arg-type]
    assert len(identities.text) < 1_500_000
    shards[count // 2] = Numbered(-1)
    said = Identities(shards).difference(identities.text, [])  # type: ignore[arg-type]
    assert said == "-1 changed or is another one"


def test_a_link_is_read_as_what_it_links_to(folder: Path, tmp_path: Path) -> None:
    _, state = stopped_state(open_training(config(folder), 1), 7)
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        os.symlink(path, links / path.name)
    open_training(config(links), 1).load_state_dict(state)


@pytest.mark.parametrize("key", ["epoch", "block", "shard", "record", "given", "bad_records"])
@pytest.mark.parametrize("value", [-1, 10**6, "1", None, 0.5, True])
def test_a_place_that_is_none_is_refused(folder: Path, key: str, value: Any) -> None:
    _, state = stopped_state(open_training(config(folder), 1, epochs=1), 7)
    stream = open_training(config(folder), 1, epochs=1)
    if value == 10**6 and key not in ("shard", "given"):
        return  # an epoch or block like any other
    with pytest.raises(DataError, match=r"no place in it|it changed"):
        [stream.load_state_dict({**state, key: value}), next(stream)]


def test_a_preparation_knows_where_it_stopped(folder: Path) -> None:
    """What its positions refer to is filled when a bad record is met."""
    path = folder / "2.jsonl"
    good = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*good[:6], "oops\n", *good[6:]]))
    stream = open_in_order(config(folder))
    reader = Reader(stream, "training", PrepareConfig(), config(folder).validation, SeenTexts())
    before = reader.position().position
    with pytest.raises(BadRecord):
        list(reader)
    path.write_text("".join(good))
    open_in_order(config(folder)).load_state_dict(json.loads(json.dumps(before)))


def test_reading_again_after_a_bad_record_leaves_nothing_out(folder: Path) -> None:
    whole = list(open_training(config(folder), 1, epochs=1))
    path = folder / "2.jsonl"
    good = path.read_text()
    path.write_text("oops\n" + good)
    stream = open_training(config(folder), 1, epochs=1)
    given: list[str] = []
    with contextlib.suppress(BadRecord):
        given.extend(stream)
    with pytest.raises(BadRecord):
        next(stream)
    path.write_text(good)
    assert given + list(stream) == whole


@pytest.mark.parametrize("change", ["", "moved", "edited"])
def test_a_local_data_set_is_known_by_its_files(tmp_path: Path, change: str) -> None:
    here = tmp_path / "here"
    for i in range(2):
        write_jsonl(here / f"train-{i}.jsonl", [text(10 * i + k) for k in range(10)])
    data = DataConfig(source="hf", hub_name=str(here), block_documents=4, validation=KEEP_ALL)
    whole = list(open_training(data, 1, epochs=1))
    given, state = stopped_state(open_training(data, 1, epochs=1), 9)
    if change == "moved":
        data = dataclasses.replace(data, hub_name=str(here.rename(tmp_path / "there")))
    if change == "edited":
        path = here / "train-1.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"id": 9', b'"id": 8'))
    stream = open_training(data, 1, epochs=1)
    if change == "edited":
        with pytest.raises(ConfigError, match="shard 2 of 2 changed or is another one"):
            stream.load_state_dict(state)
    else:
        stream.load_state_dict(state)
        assert given + list(stream) == whole


def test_a_state_that_knows_a_local_data_set_by_names_alone_is_accepted(tmp_path: Path) -> None:
    """As those of an earlier version."""
    for i in range(2):
        write_jsonl(tmp_path / f"train-{i}.jsonl", [text(10 * i + k) for k in range(10)])
    data = DataConfig(source="hf", hub_name=str(tmp_path), block_documents=4, validation=KEEP_ALL)
    given, state = stopped_state(open_training(data, 1, epochs=1), 9)
    names = [hashlib.blake2b(f"{tmp_path} split train shard {i} of 2".encode(), digest_size=6).digest() for i in (1, 2)]
    state["shards"] = f"6:{base64.b64encode(b''.join(names)).decode()}"
    stream = open_training(data, 1, epochs=1)
    stream.load_state_dict(state)
    assert given + list(stream) == list(open_training(data, 1, epochs=1))
