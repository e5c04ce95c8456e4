"""The manifest of prepared data: what its shards are, and whether they still are that."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from p828.data.tokenizer import Tokenizer
from p828.errors import UserError
from p828.files import MEBIBYTE, read_limited

FORMAT_VERSION = 1
MANIFEST_FILE, TOKENIZER_FILE = "manifest.json", "tokenizer.json"
LARGEST_SHARD = 2**48  # tokens
LARGEST_FILE = 8 * MEBIBYTE  # some thirty thousand shards
READ_AT_ONCE = 1 << 20  # bytes
READERS = 8  # threads, each with one file
TOKENS, DOCUMENTS = ".tokens", ".documents"
ENDINGS = {TOKENS, DOCUMENTS}


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard."""

    name: str
    tokens: int
    documents: int
    checksums: dict[str, str]
    """xxh3-128 in hexadecimal, by file ending."""


@dataclass(frozen=True)
class Manifest:
    source: str
    """Where the text came from, in words."""
    settings: dict[str, Any]
    """The sections of the configuration that it was made with."""
    tokenizer: str
    """SHA-256 of the serialised tokenizer."""
    dtype: str
    """`uint16` or `uint32`."""
    counts: dict[str, int]
    """Documents read, kept, and dropped by each filter."""
    training: tuple[ShardEntry, ...]
    validation: tuple[ShardEntry, ...]
    format_version: int = FORMAT_VERSION

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    def fingerprint(self) -> str:
        """Of everything in it: two directories with equal fingerprints hold the same rows."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


def open_manifest(directory: Path) -> Manifest:
    """Read the manifest. Raises UserError if there is none, or it is none of this version."""
    path = directory / MANIFEST_FILE
    try:
        fields = json.loads(read_limited(path, LARGEST_FILE))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version!r}; this program reads {FORMAT_VERSION}")
        for part in ("training", "validation"):
            fields[part] = tuple(ShardEntry(**shard) for shard in fields[part])
        manifest = Manifest(**fields)
        _check(manifest)
        return manifest
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. `p828 prepare CONFIG` makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a manifest of prepared data: {str(error)[:300]}") from None


def _check(manifest: Manifest) -> None:
    """Raises ValueError, KeyError or TypeError if its fields are not what their types say."""
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {manifest.dtype!r}")
    for part in (manifest.training, manifest.validation):
        numbers = [number for shard in part for number in (shard.tokens, shard.documents)]
        if not all(type(number) is int and 0 < number < LARGEST_SHARD for number in numbers) or not part:
            raise ValueError("a shard has no tokens or documents, or no possible number of them")
        if any(not re.fullmatch(r"[a-z]+-\d{5,}", shard.name) or shard.checksums.keys() != ENDINGS for shard in part):
            raise ValueError("a shard has another name or other files")
    tables = (manifest.counts, manifest.settings["data"], manifest.settings["tokenizer"])
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError("counts or settings are no tables")


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, directory: Path) -> None:
    """Raises UserError if the shards hold another tokenizer's ids."""
    if tokenizer.fingerprint() != manifest.tokenizer:
        name = manifest.settings["tokenizer"].get("name")
        raise UserError(
            f"{directory}: prepared with another tokenizer, tokenizer.name = {name!r} as it was then. Give that one, "
            "or prepare the data again into another directory"
        )


def check_shards(
    directory: Path, shards: Sequence[ShardEntry], known: Mapping[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Compare the shards' files with the manifest. Returns each one's size and time of change, in nanoseconds.

    A file that is still as `known` says is not read again, so that a run resumes at once. Raises UserError naming the
    first wrong file.
    """
    files = [(shard.name + ending, checksum) for shard in shards for ending, checksum in shard.checksums.items()]

    def check(file: tuple[str, str]) -> list[int]:
        name, checksum = file
        path = directory / name
        try:
            stat = path.stat()
            seen = [stat.st_size, stat.st_mtime_ns]
            if (known or {}).get(name) != seen and checksum_of(path) != checksum:
                raise UserError(f"{path}: damaged or changed: its checksum is not that of {MANIFEST_FILE}")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        return seen

    with ThreadPoolExecutor(READERS) as pool:
        return {name: seen for (name, _), seen in zip(files, pool.map(check, files), strict=True)}


def checksum_of(path: Path) -> str:
    """Outside the interpreter's lock, at about the memory's speed."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(READ_AT_ONCE):
            state.update(data)
    return state.hexdigest()
