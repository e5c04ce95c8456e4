"""Reading files that are small unless something is wrong with them."""

from pathlib import Path

MEBIBYTE = 2**20


def read_bounded(path: Path, most: int) -> bytes:
    """A file's content. Raises OSError, and ValueError if it has more than `most` bytes; then no more are read."""
    content = bytearray()
    with path.open("rb") as file:
        while len(content) <= most and (data := file.read(MEBIBYTE)):
            content += data
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return bytes(content)
