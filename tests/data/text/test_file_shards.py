"""Which files there are, and what is read of odd ones."""

import gzip
import lzma
import os
import re
import shlex
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import pytest
import zstandard
from data_samples import write_bytes, write_jsonl

from p828.config import DataConfig, ValidationConfig
from p828.data.retry import Retry
from p828.data.text import compression
from p828.data.text.documents import read_documents
from p828.data.text.files import FileShard, file_shards
from p828.data.text.open import open_training, open_validation
from p828.data.text.shard import BadRecord
from p828.errors import ConfigError, DataError
from p828.system import slow_count

BOUNDED = """
import resource, sys
import p828.data.text.documents
from p828.data.text.files import FileShard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
longest, bad, count = 0, 0, 0
for document in FileShard(sys.argv[1], "text", limit=16 * 10**6, skips=True).documents():
    bad += not isinstance(document, str)
    longest = max(longest, len(str(document)))
    count += 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, longest, bad, count)
"""


def names(*globs: str) -> list[str]:
    return [os.path.basename(shard.name) for shard in file_shards(globs, "text", "data.files")]


def test_a_directory_is_the_supported_files_below_it(tmp_path: Path) -> None:
    for name in ("b.txt", "in/a.jsonl.gz", "in/deep/c.md", "in/no.csv", ".hidden.txt", "in/.git/d.txt"):
        write_bytes(tmp_path / name, b"{}")
    assert names(str(tmp_path)) == ["b.txt", "a.jsonl.gz", "c.md"]
    assert names(f"{tmp_path}/") == names(str(tmp_path))
    (tmp_path / "none/sub").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"none'?: there is no file in it; files ending in \.txt, .* are accepted"):
        names(str(tmp_path / "none"))
    write_bytes(tmp_path / "none/sub/x.csv", b"")
    with pytest.raises(ConfigError, match=r"there is .*x\.csv in it; files ending in \.txt, .* are accepted"):
        names(str(tmp_path / "none"))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("named", ["file", "directory"])
def test_the_command_for_a_table_makes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, named: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = ["one", "an é, a comma\nand a second line", '"quoted"']
    table = tmp_path / "it's a table" / f"rows{ending}"
    table.parent.mkdir()
    data = datasets.Dataset.from_dict({"text": texts, "number": [1, 2, 3]})
    data.to_csv(table) if ending == ".csv" else data.to_parquet(table)
    with pytest.raises(ConfigError, match=r"files ending in \.txt, .* are accepted") as error:
        names(str(table if named == "file" else table.parent))
    command = str(error.value).partition("A line of JSON for each row of it: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True)
    (shard,) = file_shards((str(table.parent / "*.jsonl"),), "text", "data.files")
    assert list(shard.documents()) == texts


def test_a_link_to_what_is_not_there_is_named(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.txt", b"a")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    for given in (tmp_path, tmp_path / "*.txt", tmp_path / "b.txt"):
        with pytest.raises(ConfigError, match=r"b\.txt is a link to gone\.txt, which is not there"):
            names(str(given))


@pytest.mark.parametrize("name", ["a[1].txt", "a[!b].txt", "what?.txt", "star*.txt", "[ab].txt"])
def test_an_existing_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("a1.txt", "ac.txt", "whatx.txt", "starx.txt", "a.txt", name):
        (tmp_path / other).write_text(other)
    assert names(str(tmp_path / name)) == [name]
    (tmp_path / "in [x]").mkdir()
    (tmp_path / "in [x]" / "z.txt").write_text("z")
    assert names(str(tmp_path / "in [x]")) == ["z.txt"]


def test_a_file_counts_once_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "y.txt").symlink_to("x.txt")
    (tmp_path / "d").mkdir()
    spellings = ["x.txt", "./x.txt", str(tmp_path / "x.txt"), f"/{tmp_path}/x.txt", "y.txt", "d/../x.txt", "*.txt", "."]
    assert names(*spellings) == ["x.txt"]
    assert names(*reversed(spellings)) == ["x.txt"]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
    for name in ("pipe.txt", "socket.txt"):
        with pytest.raises(ConfigError, match="is neither a regular file nor a directory"):
            names(str(tmp_path / name))
        with pytest.raises(DataError, match=rf"{name}.* cannot be read"):  # put there later; not waited for, either
            list(read_documents(FileShard(str(tmp_path / name), "text"), 0, Retry(3, pytest.fail)))
    with pytest.raises(ConfigError, match="neither a regular file"):
        names("/dev/zero")
    with pytest.raises(ConfigError, match="matches no file"):
        names("a\0b.txt")
    with pytest.raises(ConfigError) as raised:
        names("x" * 5000)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_files_of_no_bytes_are_empty(tmp_path: Path, ending: str) -> None:
    for kind, expected in ((".txt", [""]), (".jsonl", [])):
        path = tmp_path / f"a{kind}{ending}"
        path.write_bytes(b"")
        assert list(FileShard(str(path), "text").documents()) == expected
        write_bytes(path, b"")  # packed, and nothing in it
        assert list(FileShard(str(path), "text").documents()) == expected


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_members_one_after_another_are_one_file(tmp_path: Path, ending: str, pack: object) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(pack(f'{{"text": "{i}"}}\n'.encode()) for i in range(3)))  # type: ignore[operator]
    assert list(FileShard(str(path), "text").documents()) == ["0", "1", "2"]


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_byte_order_marks_and_carriage_returns(tmp_path: Path, ending: str) -> None:
    mark = b"\xef\xbb\xbf"
    write_bytes(tmp_path / f"a.txt{ending}", mark + b"one\r\ntwo\rthree\n")
    write_bytes(tmp_path / f"a.jsonl{ending}", mark + b'{"text": "a\\r\\n"}\r\n\r\n{"text": "b"}\r\n')
    assert list(FileShard(str(tmp_path / f"a.txt{ending}"), "text").documents()) == ["one\ntwo\nthree\n"]
    assert list(FileShard(str(tmp_path / f"a.jsonl{ending}"), "text").documents()) == ["a\r\n", "", "b"]


def test_a_zst_that_looks_far_back_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of a length that is not known
    packed = packer.compress(b'{"text": "x"}\n' * 1000) + packer.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert list(FileShard(str(tmp_path / "a.jsonl.zst"), "text").documents()) == ["x"] * 1000
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-2])
    with pytest.raises(DataError, match=r"cannot be read: .*ends within a frame"):
        list(FileShard(str(tmp_path / "a.jsonl.zst"), "text").documents())


def write_huge(path: Path, line: bytes, times: int) -> None:
    """Repeated lines without their ends, packed as they are made, between two good records."""
    chunk = line * (1 << 20)
    first, last = b'{"text": "before"}\n', b'\n{"text": "after"}\n'
    packers = {".gz": zlib.compressobj(1, zlib.DEFLATED, 31), ".zst": zstandard.ZstdCompressor().compressobj()}
    packer = packers[path.suffix]
    with path.open("wb") as file:
        for data in (first, *[chunk] * times, last):
            file.write(packer.compress(data))
        file.write(packer.flush())


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_line_far_too_long_takes_no_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    write_huge(path, b"0", times=600)
    kilobytes, longest, bad, count = bounded(path)
    assert (bad, count) == (1, 3)
    assert longest < 1000
    assert kilobytes < 300_000, "of a line of 629 MB"
    given = list(FileShard(str(path), "text", limit=10**6, skips=True).documents())
    assert given[0], given[2] == ("before", "after")
    with pytest.raises(BadRecord, match=r"a\.jsonl.*:2: a line of more than data\.max_document_megabytes = 1 is"):
        list(FileShard(str(path), "text", limit=10**6).documents())


def test_a_sparse_file_is_read_in_pieces(tmp_path: Path) -> None:
    with (tmp_path / "zeros.txt").open("wb") as file:
        file.truncate(300 * 10**6)
    kilobytes, longest, bad, count = bounded(tmp_path / "zeros.txt")
    assert (longest, bad, count) == (compression.LARGEST_PIECE, 0, -(-300 * 10**6 // compression.LARGEST_PIECE))
    assert kilobytes < 150_000


def bounded(path: Path) -> tuple[int, ...]:
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("unit", ["läuft gut\n", "ein läufer ", "数据", "x", "\r\n"])
def test_pieces_are_the_text(tmp_path: Path, unit: str) -> None:
    whole = unit * 5000
    (tmp_path / "a.txt").write_bytes(whole.encode())
    shard = FileShard(str(tmp_path / "a.txt"), "text", limit=997)
    pieces = [piece for piece in shard.documents() if isinstance(piece, str)]
    if "\r" not in unit:
        assert "".join(pieces) == whole
    assert max(len(piece.encode()) for piece in pieces) <= 997
    assert len(pieces) > 5
    assert all(piece.endswith(unit[-1]) for piece in pieces[:-1])
    for start in (0, 1, 4, len(pieces), len(pieces) + 1):
        assert list(shard.documents(start)) == pieces[start:]
    shard.limit = len(whole.encode())
    assert len(list(shard.documents())) == 1


def test_the_bound_is_a_setting(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["short", "x" * 1_100_000])
    data = DataConfig(
        source="files",
        files=(str(path),),
        max_document_megabytes=1,
        validation=ValidationConfig(kind="files", files=(str(path),)),
    )
    for stream in (open_training(data, 0, epochs=1), open_validation(data)):
        with pytest.raises(DataError, match=r"a\.jsonl:2: a line of more than data\.max_document_megabytes = 1"):
            list(stream)


def test_blank_and_empty_sources_are_told_apart(tmp_path: Path) -> None:
    def data(name: str, content: str) -> DataConfig:
        (tmp_path / name).write_text(content)
        return DataConfig(source="files", files=(str(tmp_path / name),), validation=ValidationConfig(fraction=0.999999))

    with pytest.raises(DataError, match=r"no documents in data\.files = .*: all of it is empty"):
        next(open_training(data("empty.txt", ""), 0))
    with pytest.raises(DataError, match=r"no text in data\.files = .*: nothing but blank lines"):
        next(open_training(data("blank.txt", "\n \n\n"), 0))
    with pytest.raises(DataError, match=r"no documents in data\.files = .*: all of it is empty"):
        next(open_training(data("blank.jsonl", "\n \n\n"), 0))


@pytest.mark.parametrize("pattern", ["{here}", "{here}/**/*.txt"])
def test_a_long_look_for_files_says_how_many_there_are(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_count, "FIRST_WORD", 0.0)
    here = tmp_path / "a {brace}"
    for number in range(3):
        write_bytes(here / f"{number}" / "a.txt", b"text")
    told: list[str] = []
    file_shards((pattern.format(here=here),), "text", "data.files", report=told.append)
    assert len(told) == 1
    assert re.fullmatch(r"data\.files: .*a \{brace\}.*: look.* [01] files so far", told[0])
