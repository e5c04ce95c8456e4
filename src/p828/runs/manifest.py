"""A checkpoint's two small files, written and read: `manifest.json` and `state.json`.

The manifest lists all other files with size and SHA-256, and has a checksum of its own. The state holds JSON values
and floats that JSON does not have; such a float is an object, as {"$float": "nan"}.
"""

import errno
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p828.errors import DataError, TransientReadError
from p828.files import MEBIBYTE, open_regular, read_limited
from p828.runs.file_names import MANIFEST_FILE, STATE_FILE

FORMAT_VERSION = 3
NON_FINITE = "$float"  # key of the object that stands for a float that JSON does not have
FILE_NAME = re.compile(r"(?=.{1,255}$)[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # no longer than file systems take
LARGEST_JSON = 64 * MEBIBYTE
READ_BYTES = 8 * MEBIBYTE
# What opening gives where something else than a regular file is: not for now, but for good.
NO_FILE = (errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ELOOP)


class DamagedCheckpoint(DataError):
    """A checkpoint that is not what a run wrote: the message names the checkpoint, the file and what is wrong."""


@contextmanager
def reading_file(path: Path, file: str) -> Iterator[None]:
    """An error on reading a checkpoint's file as what it means.

    DamagedCheckpoint: no such file; DataError: no permission; TransientReadError: it may be read later.
    """
    try:
        yield
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: {file} is missing") from None
    except PermissionError as error:
        raise DataError(f"{path}: {file} cannot be read: {error.strerror}") from None
    except OSError as error:
        kind = DamagedCheckpoint if error.errno in NO_FILE else TransientReadError
        raise kind(f"{path}: {file} cannot be read: {error.strerror}") from None


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint's directory has in its state. Raises DamagedCheckpoint, DataError and TransientReadError."""
    with reading_file(path, STATE_FILE):
        try:
            state = json.loads(read_limited(path / STATE_FILE, LARGEST_JSON), object_hook=_decode)
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedCheckpoint(f"{path}: {STATE_FILE} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: {STATE_FILE} is no table of what a checkpoint's has")
    return state


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's fields without its checksum. Raises as `read_state`, and DataError for another format version.

    Later versions keep the checksum, so that a newer format is not taken for damage.
    """
    with reading_file(path, MANIFEST_FILE):
        try:
            content = read_limited(path / MANIFEST_FILE, LARGEST_JSON)
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}: {MANIFEST_FILE} cannot be read: {error}") from None
    try:
        manifest: dict[str, Any] = json.loads(content)
        del manifest["sha256"]
        intact = manifest_bytes(manifest) == content
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{path}: {MANIFEST_FILE} is not what was written: its checksum differs")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: its checkpoint format is {manifest.get('format_version')}; "
            f"this version of p828 reads format {FORMAT_VERSION}"
        )
    if not _is_manifest(manifest):
        raise DamagedCheckpoint(f"{path}: {MANIFEST_FILE} does not say what a checkpoint's does")
    return manifest


def _is_manifest(fields: Mapping[str, Any]) -> bool:
    """Whether it lists files by plain names, with sizes and checksums. Its own checksum does not show who wrote it."""
    files = fields.get("files")
    return (
        type(fields.get("step")) is int
        and isinstance(files, dict)
        and STATE_FILE in files
        and all(FILE_NAME.fullmatch(name) for name in files)
        and all(isinstance(about, dict) and about.keys() == {"size", "sha256"} for about in files.values())
        and all(type(about["size"]) is int and isinstance(about["sha256"], str) for about in files.values())
    )


def manifest_bytes(fields: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, checksum included: any other bytes are damage."""
    content = json.dumps(fields, sort_keys=True).encode()
    return json.dumps({**fields, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True, indent=2).encode()


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """The state as `read_state` reads it, if it has at most `LARGEST_JSON` bytes. Raises TypeError for a key that is
    no string.
    """
    return json.dumps(_encode(state), allow_nan=False).encode()


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a regular file, as the manifest lists them. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(READ_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            size += count
    return {"size": size, "sha256": digest.hexdigest()}


def _encode(value: Any) -> Any:
    """JSON values with non-finite floats as {NON_FINITE: "nan"}, since JSON has none."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state: key {key!r} is not a string and would come back as one")
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {NON_FINITE: repr(float(value))}
    return value


def _decode(value: dict[str, Any]) -> Any:
    """The float that an object stands for, or the object itself."""
    if value.keys() != {NON_FINITE}:
        return value
    if value[NON_FINITE] not in ("nan", "inf", "-inf"):
        raise ValueError(f"{NON_FINITE} is given for what is no float")
    return float(value[NON_FINITE])
