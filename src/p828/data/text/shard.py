"""One file-like piece of a source, and how pieces are dealt to several readers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from p828.errors import DataError


class BadRecord(DataError):
    """A line, row or text that is no document: the rest of its file can still be read."""

    def __init__(self, text: str, record: int) -> None:
        super().__init__(text)
        self.record = record
        """Its number in the shard, from 0."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Ranks pickle the errors that they tell each other of."""
        return BadRecord, (str(self), self.record), self.__dict__


class Shard(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes; 0 where they are not known."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of this machine that it is read from; none where it comes over the network."""
        ...

    def identity(self, with_contents: bool) -> str:
        """What stays the same while the shard does, also if it is moved to another directory."""
        ...

    def prefix(self, records: int) -> str:
        """A checksum of the first `records` records, to know them again; empty where there is none."""
        ...

    def fraction_read(self) -> float:
        """About how much of it the latest reader has read, from 0 to 1; 0 where that is not known."""
        ...

    def documents(self, start: int = 0) -> Iterator[str | BadRecord]:
        """The texts from the one numbered `start`; empty ones are given too, so that counting stays simple.

        Raises DataError for content that is wrong, and TransientReadError for a read that may succeed later. A shard
        that skips bad records gives the BadRecord in the text's place instead of raising it.
        """
        ...


@dataclass(frozen=True)
class EveryNth:
    """The documents of a shard whose number is ≡ part modulo parts."""

    shard: Shard
    part: int
    parts: int

    @property
    def name(self) -> str:
        return f"{self.shard.name}, {self.part} of every {self.parts}"

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.shard.paths

    def identity(self, with_contents: bool) -> str:
        return self.shard.identity(with_contents)

    def prefix(self, records: int) -> str:
        return self.shard.prefix(records)

    def fraction_read(self) -> float:
        return self.shard.fraction_read()

    def documents(self, start: int = 0) -> Iterator[str | BadRecord]:
        return islice(self.shard.documents(self.part + start * self.parts), 0, None, self.parts)


def record_of(shard: Shard, number: int) -> tuple[str, int]:
    """The name of the file or hub shard that holds a shard's document of that number, and its number there."""
    if isinstance(shard, EveryNth):
        return shard.shard.name, shard.part + number * shard.parts
    return shard.name, number


def deal(shards: Sequence[Shard], part: int, parts: int) -> Sequence[Shard]:
    """One part of `parts` that have no document in common: whole shards, or of each some if they are too few."""
    if len(shards) >= parts:
        return shards[part::parts]
    # The first document of each shard goes to another part: a shard may have but one.
    return [EveryNth(shard, (part - number) % parts, parts) for number, shard in enumerate(shards)]
