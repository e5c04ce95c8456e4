"""Checksums of whole files."""

from pathlib import Path

import xxhash

from p828.files import MEBIBYTE, open_regular


def checksum_of(path: Path) -> str:
    """xxh3-128 in hexadecimal, outside the interpreter's lock, at about the memory's speed. Raises OSError."""
    state = xxhash.xxh3_128()
    with open_regular(path) as file:
        while data := file.read(MEBIBYTE):
            state.update(data)
    return state.hexdigest()
