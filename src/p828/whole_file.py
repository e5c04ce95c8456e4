"""Files that are there whole or not at all, whenever the process or the machine stops."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put UTF-8 text in place of what the file held, in one step. Raises OSError, leaving the file as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
