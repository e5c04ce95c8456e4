"""The manifest of prepared data: what its shards are, whether they still are that, and the seal on its JSON files."""

import errno
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from p828.config import Config
from p828.config.old_names import under_old_names
from p828.data.retry import NO_RETRY, Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.checksum import checksum_of
from p828.data.tokens.source_files import SourceFiles
from p828.errors import ConfigError, DataError, TransientReadError
from p828.files import MEBIBYTE, read_limited, write_atomic

CHECKSUM = "xxh3_128"
LARGEST_FILE = 64 * MEBIBYTE  # of the manifest and the progress of prepared data: two hundred thousand shards
FORMAT_VERSION = 2
WITHOUT_CHECKSUM = 1  # the version before, which does not say what files the source had either
MANIFEST_FILE, TOKENIZER_FILE = "manifest.json", "tokenizer.json"
INDENT = 1
LARGEST_SHARD = 2**48  # tokens
LONGEST_PATH = 300  # characters of a path that are shown
READERS = 8  # threads, each with one file
FIRST_WORD, NEXT_WORD = 2.0, 30.0  # seconds of comparing after which there is a line, and another
FOR_GOOD = (  # what waiting does not mend
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ELOOP,
)  # fmt: skip
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
    """Documents read, kept, dropped by each filter, and records that were passed over."""
    training: tuple[ShardEntry, ...]
    validation: tuple[ShardEntry, ...]
    files: SourceFiles | None = None
    """The source's files, as they were when it was prepared."""
    spells_text: bool | None = None
    """Whether the tokens of its validation documents are decoded to as many bytes as the text had; older data has none.
    """
    format_version: int = FORMAT_VERSION

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def tells_bytes(self) -> bool:
        """Whether the bytes of the validation text are known from its tokens."""
        is_trained: bool = self.settings["tokenizer"]["name"] == "train"  # these are always decoded to the text
        return is_trained if self.spells_text is None else self.spells_text

    def fingerprint(self) -> str:
        """Of everything that says what it holds: two directories with equal fingerprints hold the same rows."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("files", "spells_text")}
        fields["settings"] = under_old_names(Config, self.settings)  # as fingerprints in checkpoints were made of
        return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())

    def write(self, directory: Path) -> None:
        """Raises OSError, and ConfigError if it is too large to be read again."""
        write_sealed(directory / MANIFEST_FILE, asdict(self), INDENT)


def open_manifest(directory: Path) -> Manifest:
    """Read the manifest. Raises ConfigError if there is none, or it is none of this version."""
    path = directory / MANIFEST_FILE
    try:
        content = read_limited(path, LARGEST_FILE)
        fields = json.loads(content)
        version = fields["format_version"]
        if version not in (WITHOUT_CHECKSUM, FORMAT_VERSION):
            raise ConfigError(f"{path}: format version {str(version)[:20]}; this program reads {FORMAT_VERSION}")
        values = {key: value for key, value in fields.items() if version == WITHOUT_CHECKSUM or key != CHECKSUM}
        for part in ("training", "validation"):
            values[part] = tuple(ShardEntry(**shard) for shard in values[part])
        if version == FORMAT_VERSION:
            values["files"] = SourceFiles(**values["files"])
        manifest = Manifest(**values)
        _check(manifest)
        if version == FORMAT_VERSION:
            check_seal(content, fields, INDENT)
        return manifest
    except OSError as error:
        raise ConfigError(
            f"{str(path)[-LONGEST_PATH:]}: cannot be read: {error.strerror}. `p828 prepare CONFIG` makes it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a manifest of prepared data: {str(error)[:300]}") from None


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
        if not all(isinstance(checksum, str) for shard in part for checksum in shard.checksums.values()):
            raise ValueError("a checksum is no text")
    tables = (manifest.counts, *(manifest.settings[section] for section in ("data", "tokenizer", "prepare")))
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError("counts or settings are no tables")
    counts = manifest.counts
    if not all(type(count) is int and count >= 0 for count in counts.values()) or not counts["training"]:
        raise ValueError("counts are no numbers, or no document was kept")
    if not {"name", "vocab_size", "eos_token"} <= manifest.settings["tokenizer"].keys():
        raise ValueError("the tokenizer's settings are not all there")
    if not isinstance(manifest.files, SourceFiles | None) or not isinstance(manifest.spells_text, bool | None):
        raise ValueError("files are no files of a source, or spells_text is neither true nor false")
    if not isinstance(manifest.source, str) or not isinstance(manifest.tokenizer, str) or "validation" not in counts:
        raise ValueError("a field is missing or no text")


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, directory: Path) -> None:
    """Raises ConfigError if the shards hold another tokenizer's ids."""
    if tokenizer.fingerprint() != manifest.tokenizer:
        name = manifest.settings["tokenizer"].get("name")
        raise ConfigError(
            f"{directory}: prepared with another tokenizer, tokenizer.name = {name!r} as it was then. Give that one, "
            "or prepare the data again into another directory"
        )


def check_shards(
    directory: Path,
    shards: Sequence[ShardEntry],
    known: Mapping[str, list[int]] | None = None,
    retry: Retry = NO_RETRY,
    part: tuple[int, int] = (0, 1),
) -> dict[str, list[int]]:
    """Compare the shards' files with the manifest. Returns each one's size and time of change, in nanoseconds.

    A file that is still as `known` says is not read again, so that a run resumes at once. Of several that compare the
    same files, each takes a part: its number and theirs. The retry's `report` is given a line when it takes long.
    Raises DataError naming a wrong file, and TransientReadError.
    """
    number, parts = part
    files = [(shard.name + ending, checksum) for shard in shards for ending, checksum in shard.checksums.items()]

    def check(name: str, checksum: str) -> list[int]:
        path = directory / name
        try:
            stat = path.stat()
            seen = [stat.st_size, stat.st_mtime_ns]
            if (known or {}).get(name) != seen and checksum_of(path) != checksum:
                raise DataError(f"{path}: damaged or changed: its checksum is not that of {MANIFEST_FILE}")
        except OSError as error:
            kind = DataError if error.errno in FOR_GOOD else TransientReadError
            raise kind(f"{path}: cannot be read: {error.strerror}") from None
        return seen

    with ThreadPoolExecutor(READERS) as pool:
        checks = {
            name: pool.submit(retry.call, partial(check, name, checksum)) for name, checksum in files[number::parts]
        }
        try:
            _wait(directory, list(checks.values()), retry)
            return {name: check.result() for name, check in checks.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _wait(directory: Path, checks: Sequence[Future[list[int]]], retry: Retry) -> None:
    """Until all are done or one has failed, which is raised. A line says so when it takes long."""
    left, patience, done = set(checks), FIRST_WORD, 0
    begun = time.monotonic()
    while left:
        finished, left = wait(left, max(begun + patience - time.monotonic(), 0), return_when=FIRST_EXCEPTION)
        for check in finished:
            check.result()
        done += len(finished)
        if left:
            retry.report(f"{directory}: comparing its files with their checksums: {done} of {len(checks)} done")
            patience += NEXT_WORD


def write_sealed(path: Path, fields: dict[str, Any], indent: int | None = None) -> None:
    """Put the fields and their checksum in place of what the file held. Raises OSError.

    Raises ConfigError, leaving the file as it was, if they are more than its readers accept.
    """
    text = _spelled(fields, indent)
    if len(text) > LARGEST_FILE:
        raise ConfigError(
            f"{path}: would have {len(text):,} bytes, and at most {LARGEST_FILE:,} are accepted. Give patterns or "
            "directories in place of long lists of file names"
        )
    write_atomic(path, text)


def check_seal(content: bytes, fields: dict[str, Any], indent: int | None = None) -> None:
    """Raises ValueError if `content`, which holds these fields and perhaps their checksum, is not as it was written."""
    unsealed = {key: value for key, value in fields.items() if key != CHECKSUM}
    if content != _spelled(unsealed, indent).encode():
        raise ValueError("its checksum is another")


def _spelled(fields: dict[str, Any], indent: int | None) -> str:
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(fields, indent=indent).encode())
    return json.dumps({**fields, CHECKSUM: checksum}, indent=indent)
