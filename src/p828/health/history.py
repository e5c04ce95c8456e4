"""The whole run in at most 256 blocks of steps, for what goes on over thousands of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from p828.runs.records import finite_number

MOST = 256  # blocks; when there are more, neighbours are joined
NAMES = ("loss", "grad_norm", "memory_bytes", "disk_free_bytes", "tokens_per_second", "seconds")


@dataclass(slots=True)
class Numbers:
    """The finite numbers of one name in some steps in a row."""

    sum: float
    count: int
    newest: float
    """That of the last step."""


@dataclass
class Block:
    """Some steps in a row."""

    first: int
    last: int
    numbers: dict[str, Numbers] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """None if no step has the number."""
        found = self.numbers.get(name)
        return found.sum / found.count if found else None

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        self.last = step
        for name in NAMES:
            value = finite_number(record.get(name))
            if value is None:
                continue
            found = self.numbers.get(name)
            if found is None:
                self.numbers[name] = Numbers(value, 1, value)
                continue
            found.sum += value
            found.count += 1
            found.newest = value

    def join(self, later: "Block") -> None:
        self.last = later.last
        for name, new in later.numbers.items():
            found = self.numbers.get(name)
            self.numbers[name] = (
                new if found is None else Numbers(found.sum + new.sum, found.count + new.count, new.newest)
            )


class History:
    """Blocks of equally many steps, whose number doubles whenever there would be more than 256 blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.steps_a_block = 1
        self._in_last = 0

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        if not self.blocks or self._in_last == self.steps_a_block:
            if len(self.blocks) == MOST:
                self._halve()
            self.blocks.append(Block(step, step))
            self._in_last = 0
        self.blocks[-1].add(step, record)
        self._in_last += 1

    def means(self, name: str) -> list[tuple[Block, float]]:
        """The blocks that have the number, with its mean."""
        return [(block, mean) for block in self.blocks if (mean := block.mean(name)) is not None]

    def _halve(self) -> None:
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            first.join(second)
        self.blocks = self.blocks[::2]
        self.steps_a_block *= 2
