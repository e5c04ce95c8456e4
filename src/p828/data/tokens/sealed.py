"""JSON files with a checksum over themselves, so that no byte of them changes unnoticed."""

import json
from pathlib import Path
from typing import Any

import xxhash

from p828.errors import ConfigError
from p828.files import MEBIBYTE, write_atomic

CHECKSUM = "xxh3_128"
LARGEST_FILE = 64 * MEBIBYTE  # of the manifest and the progress of prepared data: two hundred thousand shards


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
