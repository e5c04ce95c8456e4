"""The whole run in at most 256 blocks of steps, for what goes on over thousands of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from p828.runs.records import number

MOST = 256  # blocks; when there are more, neighbours are joined
NAMES = ("loss", "grad_norm", "memory_bytes", "disk_free_bytes", "tokens_per_second", "seconds")


@dataclass
class Block:
    """Sums over the finite numbers of some steps in a row."""

    first: int
    last: int
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    newest: dict[str, float] = field(default_factory=dict)
    """The last step's numbers."""
    highest: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """None if no step has the number."""
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        self.last = step
        for name in NAMES:
            value = number(record.get(name))
            if value is not None and math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
                self.newest[name] = value
                self.highest[name] = max(self.highest.get(name, -math.inf), value)

    def join(self, later: "Block") -> None:
        self.last = later.last
        for name in later.counts:
            self.sums[name] = self.sums.get(name, 0.0) + later.sums[name]
            self.counts[name] = self.counts.get(name, 0) + later.counts[name]
            self.highest[name] = max(self.highest.get(name, -math.inf), later.highest[name])
        self.newest |= later.newest


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
