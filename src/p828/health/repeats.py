"""Batches that come again, found as the steps come."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

KEPT = 20_000  # steps whose hashes are known; the first ones stay, since data that restarts brings these
FIRST = 1_000
IN_A_ROW = 2  # hashes have 32 bits: in a long run one pair is equal by chance, two pairs in a row are not


class Repeats:
    """Steps whose rows have the hash of an earlier step's rows in the same epoch, at the same distance in a row."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps that repeat earlier ones."""
        self.first: tuple[int, int] | None = None
        """The first step that repeats one, and which."""
        self.newest: tuple[int, int] | None = None
        self._first: dict[tuple[str, int], int] = {}
        """Step by hash and epoch, of what one of the first steps had."""
        self._later: OrderedDict[tuple[str, int], int] = OrderedDict()  # a plain dict is slow to lose its oldest entry
        self._run = 0
        self._distance = 0

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        rows, epoch = record.get("rows"), record.get("epoch", 0)
        if not isinstance(rows, str) or not isinstance(epoch, int):
            return
        key = (rows, epoch)
        before = self._first.get(key) or self._later.get(key)
        self._remember(key, step)
        if before is None or before >= step:
            self._run = 0
            return
        distance = step - before
        self._run = self._run + 1 if distance == self._distance or not self._run else 1
        self._distance = distance
        if self._run >= IN_A_ROW:
            self.steps += IN_A_ROW if self._run == IN_A_ROW else 1
            self.newest = (step, before)
            self.first = self.first or (step - IN_A_ROW + 1, before - IN_A_ROW + 1)

    def _remember(self, key: tuple[str, int], step: int) -> None:
        if step <= FIRST or key in self._first:
            self._first[key] = step
            return
        self._later[key] = step
        if len(self._first) + len(self._later) > KEPT:
            self._later.popitem(last=False)
