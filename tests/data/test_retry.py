from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from data_samples import write_bytes, write_jsonl

from p828.data.retry import Retry
from p828.data.text.documents import read_documents
from p828.data.text.files import FileShard
from p828.errors import DataError, TransientReadError


@dataclass
class Unsteady:
    """Ten documents; reading fails before those of the given numbers, so many times each."""

    failures: dict[int, int]
    name: str = "unsteady"
    size: int = 0
    opened: list[int] = field(default_factory=list)

    def fraction_read(self) -> float:
        return 0.0

    def documents(self, start: int = 0) -> Iterator[str]:
        self.opened.append(start)
        for number in range(start, 10):
            if self.failures.get(number, 0):
                self.failures[number] -= 1
                raise TransientReadError(f"before {number}")
            yield str(number)


def test_failed_reads_are_repeated_from_where_they_failed() -> None:
    shard, waits, said = Unsteady({0: 2, 4: 3, 9: 1}), list[float](), list[str]()
    assert list(read_documents(shard, 0, Retry(3, waits.append, said.append))) == list("0123456789")
    assert waits == [1, 2, 1, 2, 4, 1]  # a document in between starts the waits again
    assert shard.opened == [0, 0, 0, 4, 4, 4, 9]
    assert said[0] == "before 0; attempt 2 of 4 in 1 s"


def test_after_the_last_attempt_the_failure_is_raised() -> None:
    waits: list[float] = []
    given: list[str] = []
    with pytest.raises(TransientReadError, match="before 3"):
        given.extend(read_documents(Unsteady({3: 3}), 1, Retry(2, waits.append)))
    assert waits == [1, 2]


def test_a_file_that_is_away_may_come_back(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    away = path.rename(tmp_path / "away")
    said: list[str] = []
    retry = Retry(1, lambda seconds: away.rename(path), said.append)
    assert list(read_documents(FileShard(str(path), "text"), 1, retry)) == ["two"]
    assert "a.jsonl: cannot be read: " in said[0]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_damaged_file_is_not_read_again(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    write_bytes(path, b"some text " * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.txt.*cannot be read"):
        list(read_documents(FileShard(str(path), "text"), 0, Retry(5, pytest.fail)))
