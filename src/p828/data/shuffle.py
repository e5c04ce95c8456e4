"""Rows in random order: neighbours in a document should not be neighbours in a batch."""

from collections.abc import Iterator
from typing import Any

from p828.data.packing import Packer, Row
from p828.data.source import permutation


class RowShuffler:
    """Endless iterator over a packer's rows, `rows` at a time in an order drawn from (seed, block number).

    While a block is given, the next one is read, a row for a row, so that no batch waits for a whole block. The state
    is the packer's before the current block and how many of its rows were given: no row is stored, the block is read
    again on load.
    """

    def __init__(self, packer: Packer, rows: int, seed: int) -> None:
        self.packer, self.rows, self.seed = packer, rows, seed
        self._restart(packer.state_dict(), block=0, given=0)

    def _restart(self, packer_state: dict[str, Any], block: int, given: int) -> None:
        self._begin = self._next_begin = packer_state
        self._block, self._given = block, given
        self._current: list[Row] = []
        self._ahead: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """Raises what the packer raises."""
        if self._given == self.rows:
            self._block, self._given, self._current = self._block + 1, 0, []
        if not self._current:
            self._begin_block()
        self._ahead.append(next(self.packer))
        row = self._current[self._order[self._given]]
        self._given += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row given."""
        if self._given == self.rows:
            return {"packer": self._next_begin, "block": self._block + 1, "given": 0}
        return {"packer": self._begin, "block": self._block, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError as `Packer.load_state_dict`."""
        self.packer.load_state_dict(state["packer"])
        self._restart(state["packer"], state["block"], state["given"])

    def _begin_block(self) -> None:
        while len(self._ahead) < self.rows:
            self._ahead.append(next(self.packer))
        self._begin, self._next_begin = self._next_begin, self.packer.state_dict()
        self._current, self._ahead = self._ahead, []
        self._order = permutation(self.rows, (self.seed, self._block, 0, 1))  # documents have keys of three
