"""What a state keeps of a source's shards: enough to notice that one has changed, and to name it."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from p828.data.text.shard import EveryNth, Shard

MOST_COMPARED = 10_000  # files whose beginning and end are read, to know them again; of more it is name and size
BYTES_EACH, BYTES_IN_ALL = 6, 800_000


class Identities:
    """A hash of each shard, of six bytes, or fewer where there are very many shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Raises DataError or TransientReadError if a file cannot be read."""
        self._shards = shards
        width = max(min(BYTES_EACH, BYTES_IN_ALL // max(len(shards), 1)), 1)
        with_contents = len(shards) <= MOST_COMPARED
        self._hashes = _hashes([shard.identity(with_contents) for shard in shards], width)
        self.text = _text(self._hashes, width)
        """All of them, for a state."""
        names = [_own_name(shard) for shard in shards]
        # Earlier versions knew the shards of a local directory in the hub's layout by their names only.
        self._text_of_names = _text(_hashes(names, width), width)

    def stopped(self, number: int, record: int) -> dict[str, Any]:
        """What is to be known of a shard whose record could not be used, to accept the shard when it is mended."""
        shard = self._shards[number]
        return {"shard": self._hashes[number].hex(), "record": record, "prefix": shard.prefix(record)}

    def difference(self, text: str, stopped: Sequence[dict[str, Any]]) -> str:
        """How the shards differ from those of a state, in words; empty if they do not, or were only mended."""
        if text in (self.text, self._text_of_names):
            return ""
        width, _, encoded = text.partition(":")
        packed = base64.b64decode(encoded)
        before = [packed[i : i + int(width)] for i in range(0, len(packed), int(width))]
        if len(before) == len(self._hashes):
            changed = [i for i, now in enumerate(self._hashes) if now != before[i]]
            changed = [i for i in changed if not self._is_mended(i, before[i].hex(), stopped)]
            return self._named(changed, "changed or is another one") if changed else ""
        known = set(before)
        new = [i for i, now in enumerate(self._hashes) if now not in known]
        if new:
            return self._named(new, "is new or changed")
        return f"it had {len(before):,} files or shards, and has {len(self._hashes):,}"

    def _is_mended(self, number: int, before: str, stopped: Sequence[dict[str, Any]]) -> bool:
        """Whether the reading stopped in the shard, and what comes before that place is still the same."""
        return any(
            place["shard"] == before and self._shards[number].prefix(place["record"]) == place["prefix"]
            for place in stopped
        )

    def _named(self, numbers: Sequence[int], what: str) -> str:
        others = f" (and {len(numbers) - 1:,} more)" if len(numbers) > 1 else ""
        return f"{_own_name(self._shards[numbers[0]])}{others} {what}"


def _own_name(shard: Shard) -> str:
    return shard.shard.name if isinstance(shard, EveryNth) else shard.name


def _hashes(identities: Sequence[str], width: int) -> list[bytes]:
    return [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=width).digest() for text in identities]


def _text(hashes: Sequence[bytes], width: int) -> str:
    return f"{width}:{base64.b64encode(b''.join(hashes)).decode()}"
