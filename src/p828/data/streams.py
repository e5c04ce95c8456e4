"""Rows of text that is tokenized on the way, from several streams that ranks share without overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from p828.data.sample import Sample
from p828.data.shuffle import SampleShuffler
from p828.data.text.documents import DocumentStream
from p828.errors import ConfigError


@dataclass
class Stream:
    rows: SampleShuffler
    given: int = 0
    """Rows that were taken out of it here."""
    wanted: int = 0
    """Rows that it has given to all ranks: the ones beyond `given` are to be passed over."""


class Streams:
    """Micro-batch m, counted over all ranks, takes its rows from stream m modulo their number.

    So the order of rows is the same for any number of ranks, and if their number divides that of the streams, each
    rank reads streams of its own. Otherwise several read the same one and pass over what belongs to others.
    """

    def __init__(self, streams: Sequence[SampleShuffler], documents: Sequence[DocumentStream] = ()) -> None:
        """`documents` are what each stream's rows are made of."""
        self.streams = [Stream(rows) for rows in streams]
        self.documents = documents
        self._stopped: list[dict[str, Any]] = []
        for stream in documents:
            # All states share one list. Reading ends at a bad record ahead of the step that is trained, and the run
            # goes on from an earlier batch's state, which has to know of that record, too.
            stream.stopped = self._stopped

    def take(self, batch: int, count: int) -> list[Sample]:
        """The next `count` rows, for micro-batch number `batch`. Raises what reading them raises."""
        stream = self.streams[batch % len(self.streams)]
        while stream.given < stream.wanted:
            next(stream.rows)
            stream.given += 1
        stream.wanted += count
        stream.given += count
        return [next(stream.rows) for _ in range(count)]

    def skip(self, batch: int, count: int) -> None:
        """Leave the next `count` rows to the rank that has this micro-batch."""
        self.streams[batch % len(self.streams)].wanted += count

    def state_dict(self) -> dict[str, Any]:
        return {
            "streams": [
                {"given": stream.given, "wanted": stream.wanted, "rows": stream.rows.state_dict()}
                for stream in self.streams
            ],
            "bad_records": [stream.bad_records for stream in self.documents],
            "stopped": self._stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError as `DocumentStream.load_state_dict`, and if the state is of prepared data."""
        if "streams" not in state:
            raise ConfigError("data.prepared is empty: the run was trained on prepared data. Give its directory")
        self._stopped[:] = state.get("stopped", [])
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.rows.load_state_dict(saved["rows"])
            stream.given, stream.wanted = saved["given"], saved["wanted"]
        self._stopped.clear()  # the record that was mended is an ordinary one now
