"""A file that grows, and that an interrupted process goes on with where its content is known."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from p828.errors import ConfigError
from p828.files import MEBIBYTE, open_appended, open_regular


class PartialFile:
    """Bytes are only added. A state is a length and the checksum (xxh3-128) of what the file holds up to there.

    The file is not buffered by Python, which would try to write what is left when there is no room for it.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None, finished: Path | None = None) -> None:
        """Begin an empty file, or go on with what `path` held, or `finished`, which it was renamed to, at a state.

        What comes after the state is cut off before anything is added, and not before. Raises ConfigError if the file
        is not what it was, and OSError, as for anything but a regular file.
        """
        self.path, self._pending = path, bytearray()
        self._file: BinaryIO | None = None
        self._hash = xxhash.xxh3_128()
        self._written = 0 if state is None else int(state["bytes"])
        self._now = finished if finished is not None and os.path.lexists(finished) else path
        if state is None:
            self._now = path
            self._begin()
        elif self._written:
            self._verify(state["xxh3_128"])

    def __len__(self) -> int:
        """Bytes that were added, from the beginning."""
        return self._written + len(self._pending)

    def add(self, data: bytes) -> None:
        """Raises OSError; what has been added since the last state is lost then."""
        self._pending += data
        if len(self._pending) >= MEBIBYTE:
            self._flush()

    def state_dict(self) -> dict[str, Any]:
        """What is safe on the disk when this returns. Raises OSError."""
        file = self._flush()
        os.fsync(file.fileno())
        return {"bytes": self._written, "xxh3_128": self._hash.hexdigest()}

    def chunks(self) -> Iterator[bytes]:
        """What the file holds up to the state that it was opened with. Raises OSError."""
        left = self._written
        if not left:
            return
        with open_regular(self._now) as file:
            while left and (data := file.read(min(left, MEBIBYTE))):
                left -= len(data)
                yield data

    def finish(self, path: Path) -> str:
        """Have all of it on the disk under another name, for good. Returns its checksum. Raises OSError."""
        checksum: str = self.state_dict()["xxh3_128"]
        self.close()
        os.replace(self.path, path)
        return checksum

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _verify(self, checksum: str) -> None:
        remove = f"Remove {self.path.parent} to begin again"
        try:
            if self._now.is_symlink():
                raise ConfigError(f"{self._now}: is a link; a regular file is accepted")
            size = 0
            for data in self.chunks():
                size += len(data)
                self._hash.update(data)
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: gone since the preparation was interrupted. {remove}") from None
        if size < self._written or self._hash.hexdigest() != checksum:
            raise ConfigError(f"{self._now}: changed since the preparation was interrupted. {remove}")

    def _begin(self) -> BinaryIO:
        if self._file is None:
            if self._now != self.path:
                os.replace(self._now, self.path)
            self._file = open_appended(self.path)
            self._file.truncate(self._written)
        return self._file

    def _flush(self) -> BinaryIO:
        file = self._begin()
        self._hash.update(self._pending)
        left = memoryview(bytes(self._pending))
        self._pending.clear()
        while left:
            try:
                count = file.write(left)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self._written += count
            left = left[count:]
        return file
