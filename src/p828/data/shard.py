"""One file-like piece of a source, and how pieces are dealt to several readers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol


class Shard(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes, to notice on a resume that a file changed; 0 where it is not known."""
        ...

    def share_read(self) -> float:
        """About how much of it the latest reader has read, from 0 to 1; 0 where that is not known."""
        ...

    def documents(self, start: int = 0) -> Iterator[str]:
        """The texts from the one numbered `start`; empty ones are given too, so that counting stays simple.

        Raises UserError for content that is wrong, and ReadFailed for a read that may succeed later.
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

    def share_read(self) -> float:
        return self.shard.share_read()

    def documents(self, start: int = 0) -> Iterator[str]:
        return islice(self.shard.documents(self.part + start * self.parts), 0, None, self.parts)


def deal(shards: Sequence[Shard], part: int, parts: int) -> Sequence[Shard]:
    """One part of `parts` that have no document in common: whole shards, or of each some if they are too few."""
    if len(shards) >= parts:
        return shards[part::parts]
    # The first document of each shard goes to another part: a shard may have but one.
    return [EveryNth(shard, (part - number) % parts, parts) for number, shard in enumerate(shards)]
