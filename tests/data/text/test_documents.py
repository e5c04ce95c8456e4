import json
import random
import sysconfig
from pathlib import Path

import pytest
from data_samples import text, write_bytes, write_jsonl

from p828.config import DataConfig, ValidationConfig
from p828.data.text.documents import DocumentStream, is_held_out, permutation
from p828.data.text.files import FileShard, python_shards
from p828.data.text.open import open_training, open_validation
from p828.errors import ConfigError, DataError

KEEP_ALL = ValidationConfig(kind="files", files=("none",))


def files_config(tmp_path: Path, counts: tuple[int, ...] = (7, 1, 0, 13, 4), block: int = 5) -> DataConfig:
    number = 0
    for i, count in enumerate(counts):
        write_jsonl(tmp_path / f"{i}.jsonl", [text(number + k) for k in range(count)])
        number += count
    return DataConfig(source="files", files=(str(tmp_path / "*.jsonl"),), block_documents=block, validation=KEEP_ALL)


def take(stream: DocumentStream, count: int) -> list[str]:
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("block", [1, 5, 8, 25, 1000])
def test_each_epoch_gives_every_document_once(tmp_path: Path, block: int) -> None:
    config = files_config(tmp_path, block=block)
    everything = sorted(text(i) for i in range(25))
    stream = open_training(config, seed=3)
    epochs = [take(stream, 25) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(open_training(config, seed=3, epochs=2)) == epochs[0] + epochs[1]
    assert list(open_training(config, seed=4, epochs=1)) != epochs[0]


def test_documents_are_shuffled_inside_each_block(tmp_path: Path) -> None:
    given = list(open_training(files_config(tmp_path, counts=(50,), block=25), seed=0, epochs=1))
    number = {text(i): i for i in range(50)}
    first, second = [[number[t] for t in block] for block in (given[:25], given[25:])]
    assert sorted(first) == list(range(25))
    assert sorted(second) == list(range(25, 50))
    assert first != sorted(first)
    assert [i - 25 for i in second] != first


def test_resume_gives_exactly_the_next_document(tmp_path: Path) -> None:
    config = files_config(tmp_path)
    whole = list(open_training(config, seed=1, epochs=4))
    assert len(whole) == 100
    for stop in range(101):
        first = open_training(config, seed=1, epochs=4)
        assert take(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 200
        second = open_training(config, seed=1, epochs=4)
        second.load_state_dict(state)
        assert second.state_dict() == state
        again = random.Random(stop).randint(0, 100 - stop)
        assert take(second, again) == whole[stop : stop + again]
        third = open_training(config, seed=1, epochs=4)
        take(third, 3)  # what it gave before loading leaves no trace
        third.load_state_dict(second.state_dict())
        assert list(third) == whole[stop + again :]


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    config = files_config(tmp_path)
    state = open_training(config, seed=1).state_dict()
    open_training(config, seed=1, epochs=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="not the data of the checkpoint"):
        open_training(config, seed=2).load_state_dict(state)
    write_jsonl(tmp_path / "another.jsonl", ["x"])
    with pytest.raises(ConfigError, match=r"train\.seed"):
        open_training(config, seed=1).load_state_dict(state)


def test_held_out_documents_are_disjoint_and_complete(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [text(i) for i in range(1000)])
    write_jsonl(tmp_path / "b.jsonl", [text(i) for i in range(900, 1500)])  # duplicates stay on one side
    config = DataConfig(source="files", files=(str(tmp_path / "*.jsonl"),), validation=ValidationConfig(fraction=0.1))
    training, validation = list(open_training(config, seed=0, epochs=1)), list(open_validation(config))
    assert not set(training) & set(validation)
    assert sorted(training + validation) == sorted(text(i) for i in [*range(1000), *range(900, 1500)])
    # Binomial(1500, 0.1): the mean is 150, five standard deviations are 58.
    assert 92 < len(set(validation)) < 208
    assert list(open_validation(config)) == validation
    assert sum(is_held_out(text(i), 0.5) for i in range(1500)) > len(set(validation))


def test_held_out_shards_are_spread() -> None:
    config = DataConfig(validation=ValidationConfig(fraction=0.1))
    shards = {(shard.root / shard.name).read_text(encoding="utf-8"): i for i, shard in enumerate(python_shards())}
    places = [shards[document] for document in open_validation(config)]
    assert len(places) > 20
    assert places != sorted(places)
    assert max(places[:10]) > len(shards) / 2


def test_python_source_is_the_library_without_its_tests() -> None:
    names = [shard.name for shard in python_shards()]
    assert names == sorted(names, key=Path)
    assert {"json/decoder.py", "argparse.py", "unittest/case.py"} <= set(names)
    assert not [
        name
        for name in names
        if "site-packages" in name or "/test/" in name or "tests/" in name or "encodings/" in name
    ]
    argparse = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    assert argparse in set(open_training(DataConfig(validation=KEEP_ALL), seed=0, epochs=1))


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("ending", [".txt", ".py", ".md", ".jsonl"])
def test_every_kind_of_file(tmp_path: Path, ending: str, compression: str) -> None:
    path = tmp_path / f"file{ending}{compression}"
    texts = ["naïve\nzwei  \n", "", "x\u2028y"]
    if ending == ".jsonl":
        lines = "".join(json.dumps({"content": t}, ensure_ascii=False) + "\n" for t in texts) + "\n"
        write_bytes(path, lines.encode())
        expected = [*texts, ""]
    else:
        write_bytes(path, texts[0].encode())
        expected = texts[:1]
    shard = FileShard(str(path), "content")
    for start in range(len(expected) + 2):
        assert list(shard.documents(start)) == expected[start:]
    config = DataConfig(source="files", files=(str(path),), text_field="content", validation=KEEP_ALL)
    assert sorted(open_training(config, seed=0, epochs=1)) == sorted(t for t in expected if t)


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_bytes(tmp_path / f"{name}.zst", f'{{"text": "{name}"}}\n'.encode())
    both = tmp_path / "both.jsonl.zst"
    both.write_bytes((tmp_path / "a.zst").read_bytes() + (tmp_path / "b.zst").read_bytes())
    assert list(FileShard(str(both), "text").documents()) == ["a", "b"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_damaged_file_is_named(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    write_bytes(path, random.Random(0).randbytes(5000).hex().encode())
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"no such format" * 10):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.txt{compression}: cannot be read"):
            list(FileShard(str(path), "text").documents())


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: cannot be read: 'utf-8'"):
        list(FileShard(str(tmp_path / "latin.txt"), "text").documents())


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": oops}', r"a\.jsonl:3: not a line of JSON"),
        ('["text"]', r"a\.jsonl:3: a JSON object with the field 'text' is accepted, not list"),
        ('{"id": 1, "content": "x"}', r"a\.jsonl:3: no field 'text' \(data\.text_field\); fields here: id, content"),
        ('{"text": 7}', r"a\.jsonl:3: field 'text' \(data\.text_field\) holds int, not text"),
        ('{"text": null}', r"a\.jsonl:3: field 'text' \(data\.text_field\) holds NoneType, not text"),
        ("[" * 100_000, r"a\.jsonl:3: not a line of JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n", encoding="utf-8")
    config = DataConfig(source="files", files=(str(tmp_path / "a.jsonl"),), validation=KEEP_ALL)
    with pytest.raises(DataError, match=message) as raised:
        list(open_training(config, seed=0, epochs=1))
    assert "\n" not in str(raised.value)


def test_half_a_surrogate_pair_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n', encoding="utf-8")
    assert list(FileShard(str(tmp_path / "a.jsonl"), "text").documents()) == ["a?b"]


def test_globs_that_match_nothing_and_unknown_endings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "directory.txt").mkdir()

    def config(*globs: str) -> DataConfig:
        return DataConfig(source="files", files=tuple(str(tmp_path / g) for g in globs), validation=KEEP_ALL)

    assert list(open_training(config("*.txt", "a.*"), seed=0, epochs=1)) == ["x"]
    with pytest.raises(ConfigError, match=r"data\.files: '.*/c\.txt' matches no file"):
        open_training(config("a.txt", "c.txt"), seed=0)
    with pytest.raises(
        ConfigError, match=r"b\.csv: files ending in \.txt, \.py, \.md, \.jsonl are accepted, also with"
    ):
        open_training(config("*.*"), seed=0)
    with pytest.raises(ConfigError, match=r"data\.validation\.files: 'none' matches no file"):
        open_validation(config("a.txt"))


def test_a_source_without_documents_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n\n')
    config = DataConfig(source="files", files=(str(tmp_path / "*.*"),))
    with pytest.raises(DataError, match=r"no documents in data\.files = \["):
        next(open_training(config, seed=0))
    with pytest.raises(DataError, match=r"no documents in the held-out part \(data\.validation\.fraction = 0\.01\) of"):
        next(open_validation(config))


def test_validation_files_come_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["3", "4"])
    write_jsonl(tmp_path / "a.jsonl", ["1", "2"])
    validation = ValidationConfig(kind="files", files=(str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")))
    assert list(open_validation(DataConfig(validation=validation))) == ["1", "2", "3", "4"]


def test_permutations_stay_as_they_are() -> None:
    # A checkpoint's position means something only while these do not change.
    assert permutation(8, (0, 0, 0)) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, (7, 1, 2)) == [5, 2, 4, 3, 1, 6, 7, 0]
