"""What files a source had when it was prepared, to notice that it has others now."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from p828.data.text.shard import Shard
from p828.data.tokens.checksum import checksum_of
from p828.errors import TransientReadError

MOST_NAMED = 1000  # files whose names are kept
SHOWN = 3
READERS = 8  # threads, each with one file


@dataclass(frozen=True)
class SourceFiles:
    count: int
    bytes: int
    xxh3_128: str
    """Of all names and sizes."""
    sizes: dict[str, int]
    """By name; empty if there are over a thousand."""
    times: str = ""
    """xxh3-128 of all files' sizes and times of change; empty in what an earlier version wrote."""
    contents: str = ""
    """xxh3-128 of all files' checksums; empty where they are not known."""
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh3-128 of each file, by the shard's name; empty as `sizes` is."""

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "SourceFiles":
        """Names, sizes and times; no file is read. Raises ConfigError or TransientReadError for a file that is gone."""
        state, sizes = xxhash.xxh3_128(), {}
        total = 0
        for shard in shards:
            size = shard.size
            total += size
            state.update(f"{shard.name}\0{size}\n".encode("utf-8", "surrogateescape"))
            if len(shards) <= MOST_NAMED:
                sizes[shard.name] = size
        return cls(len(shards), total, state.hexdigest(), sizes, _times(shards))

    def with_contents(
        self, shards: Sequence[Shard], report: Callable[[int], None] = lambda done: None
    ) -> "SourceFiles":
        """With the checksums of the shards' files, which are read.

        Without them if a file has changed since `of`, or a shard is read from no file of this machine.
        `report` is given the number of shards that are read. Raises TransientReadError.
        """
        if not all(shard.paths for shard in shards):
            return self
        checksums = []
        for checksum in _checksums(shards):
            checksums.append(checksum)
            report(len(checksums))
        if _times(shards) != self.times:
            return self
        named = dict(zip((shard.name for shard in shards), checksums, strict=True)) if self.sizes else {}
        return replace(self, contents=_hash_of(checksums), checksums=named)

    def changes(self, shards: Sequence[Shard], report: Callable[[int], None] = lambda done: None) -> str:
        """What is another now, in words; empty if nothing is.

        Files are read where their times of change, or only their paths, are others. Raises as `of` and `with_contents`.
        """
        now = SourceFiles.of(shards)
        is_named_alike = now.xxh3_128 == self.xxh3_128
        if is_named_alike and self.times in ("", now.times):
            return ""
        if self.times and (now.count, now.bytes) == (self.count, self.bytes):
            now = now.with_contents(shards, report)
            if now.contents and now.contents == self.contents:
                return ""
        if is_named_alike:
            others = [name for name, checksum in now.checksums.items() if self.checksums.get(name) != checksum]
            if not self.contents:
                return "they have been changed since the preparation began"
            return _some(others, "of another content") if others else "a file's content is another"
        if not self.sizes or not now.sizes:
            return f"{now.count:,} files of {now.bytes:,} bytes, where there were {self.count:,} of {self.bytes:,}"
        changes = {
            "new": [name for name in now.sizes if name not in self.sizes],
            "gone": [name for name in self.sizes if name not in now.sizes],
            "of another size": [name for name, size in now.sizes.items() if self.sizes.get(name, size) != size],
        }
        changed = "; ".join(_some(names, kind) for kind, names in changes.items() if names)
        return changed or "the files come in another order"


def _times(shards: Sequence[Shard]) -> str:
    """Raises TransientReadError."""
    seen = []
    for path in _paths(shards):
        try:
            found = path.stat()
        except OSError as error:
            raise TransientReadError(f"{path}: cannot be read: {error.strerror}") from None
        seen.append(f"{found.st_size} {found.st_mtime_ns}")
    return _hash_of(seen)


def _checksums(shards: Sequence[Shard]) -> Iterator[str]:
    """Of each shard's files, in order. Raises TransientReadError."""
    pool = ThreadPoolExecutor(READERS)
    try:
        paths = list(dict.fromkeys(_paths(shards)))  # several shards may be in one file
        found = dict.fromkeys(paths, "")
        pending = dict(zip(paths, [pool.submit(checksum_of, path) for path in paths], strict=True))
        for shard in shards:
            for path in shard.paths:
                try:
                    found[path] = found[path] or pending[path].result()
                except OSError as error:
                    raise TransientReadError(f"{path}: cannot be read: {error.strerror}") from None
            checksums = [found[path] for path in shard.paths]
            yield checksums[0] if len(checksums) == 1 else _hash_of(checksums)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _paths(shards: Sequence[Shard]) -> Iterator[Path]:
    return (path for shard in shards for path in shard.paths)


def _hash_of(texts: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(texts).encode())


def _some(names: Sequence[str], kind: str) -> str:
    shown = ", ".join(name if len(name) < 100 else "…" + name[-100:] for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{kind}: {shown}{more}"
