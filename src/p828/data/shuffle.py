"""Rows in random order: neighbours in a document should not be neighbours in a batch."""

from collections.abc import Iterator
from typing import Any

from p828.data.sample import Sample
from p828.data.text.documents import permutation
from p828.data.text.packing import Packing
from p828.errors import DataError


class SampleShuffler:
    """Endless iterator over a packer's rows, in blocks of up to `rows`, in an order drawn from (seed, block number).

    A block ends with the epoch, so that no row comes again before all have come; a row that spans two epochs belongs
    to the first. While a block is given, the next one is read, a row for a row, so that no batch waits for a whole
    block. The state is the packer's before the current block and how many of its rows were given: no row is stored,
    the block is read again on load.
    """

    def __init__(self, packer: Packing, rows: int, seed: int) -> None:
        self.packer, self.rows, self.seed = packer, rows, seed
        self._restart(packer.state_dict(), block=0, given=0)

    def _restart(self, packer_state: dict[str, Any], block: int, given: int) -> None:
        self._begin, self._block, self._given = packer_state, block, given
        self._current: list[Sample] = []
        self._ahead_begin, self._ahead = packer_state, list[Sample]()
        self._beyond: tuple[dict[str, Any], Sample] | None = None  # the first row of the epoch after `_ahead`

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        """Raises what the packer raises."""
        if not self._current:
            self._begin_block()
            if not 0 <= self._given <= len(self._current):
                raise DataError(
                    f"{self._given} rows of a block of {len(self._current)} were given: no place in the data"
                )
        elif self._given == len(self._current):
            self._block, self._given = self._block + 1, 0
            self._begin_block()
        self._read_ahead()
        row = self._current[self._order[self._given]]
        self._given += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row given."""
        if self._current and self._given == len(self._current):
            return {"packer": self._ahead_begin, "block": self._block + 1, "given": 0}
        return {"packer": self._begin, "block": self._block, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `Packer.load_state_dict`."""
        self.packer.load_state_dict(state["packer"])
        self._restart(state["packer"], state["block"], state["given"])

    def _begin_block(self) -> None:
        while not self._is_read():
            self._read_ahead()
        self._begin, self._current = self._ahead_begin, self._ahead
        self._order = permutation(len(self._current), (self.seed, self._block, 0, 1))  # documents have keys of three
        if self._beyond is None:
            self._ahead_begin, self._ahead = self.packer.state_dict(), []
        else:
            self._ahead_begin, self._ahead = self._beyond[0], [self._beyond[1]]
            self._beyond = None

    def _is_read(self) -> bool:
        return len(self._ahead) == self.rows or self._beyond is not None

    def _read_ahead(self) -> None:
        """Read one row into the next block, unless that is complete."""
        if self._is_read():
            return
        state, row = self.packer.state_dict(), next(self.packer)
        if self._ahead and row.epoch != self._ahead[0].epoch:
            self._beyond = state, row
        else:
            self._ahead.append(row)
