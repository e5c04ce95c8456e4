"""What files a source had when it was prepared, to notice that it has others now."""

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from p828.data.text.shard import Shard

MOST_NAMED = 1000  # files whose names are kept
SHOWN = 3


@dataclass(frozen=True)
class SourceFiles:
    count: int
    bytes: int
    xxh3_128: str
    """Of all names and sizes."""
    sizes: dict[str, int]
    """By name; empty if there are over a thousand."""

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "SourceFiles":
        state, sizes = xxhash.xxh3_128(), {}
        total = 0
        for shard in shards:
            size = shard.size
            total += size
            state.update(f"{shard.name}\0{size}\n".encode("utf-8", "surrogateescape"))
            if len(shards) <= MOST_NAMED:
                sizes[shard.name] = size
        return cls(len(shards), total, state.hexdigest(), sizes)

    def changes(self, now: "SourceFiles") -> str:
        """What is another now, in words; empty if nothing is."""
        if self.xxh3_128 == now.xxh3_128:
            return ""
        if not self.sizes or not now.sizes:
            return f"{now.count:,} files of {now.bytes:,} bytes, where there were {self.count:,} of {self.bytes:,}"
        changes = {
            "new": [name for name in now.sizes if name not in self.sizes],
            "gone": [name for name in self.sizes if name not in now.sizes],
            "of another size": [name for name, size in now.sizes.items() if self.sizes.get(name, size) != size],
        }
        said = "; ".join(_some(names, kind) for kind, names in changes.items() if names)
        return said or "the files come in another order"


def _some(names: Sequence[str], kind: str) -> str:
    shown = ", ".join(name if len(name) < 100 else "…" + name[-100:] for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{kind}: {shown}{more}"
