"""Numbers in files, read by their place.

The files are read and not mapped into memory: the system ends a process whose mapped file is cut or cannot be read.
"""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from p828.data.retry import Retry
from p828.errors import DataError, TransientReadError
from p828.files import open_regular

MOST_OPEN = 1024  # files that one `NumberFiles` keeps open at most
SHARE_OPEN = 16  # it also keeps no more open than a 16th of the files that the process may open


class NumberFiles:
    """Files of numbers of one type, of which those used last are open."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any], lengths: Sequence[int], retry: Retry) -> None:
        """`lengths` are in numbers. Raises DataError naming a file that is not there or of another size."""
        self.paths, self.dtype, self.lengths, self.retry = paths, dtype, lengths, retry
        self._open: dict[int, BinaryIO] = {}  # the one used last at the end
        self._most_open = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OPEN, MOST_OPEN), 2)
        for path, length in zip(paths, lengths, strict=True):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            if size != length * dtype.itemsize:
                raise DataError(f"{path}: damaged or changed: {size:,} bytes, not {length * dtype.itemsize:,}")

    def read(self, file: int, start: int, stop: int) -> Any:
        """The numbers from `start` to `stop` of a file. Raises TransientReadError, also when the file is shorter by
        now.
        """
        start, stop = max(start, 0), min(stop, self.lengths[file])
        if start >= stop:
            return np.empty(0, self.dtype)
        return np.frombuffer(self.retry.call(lambda: self._bytes(file, start, stop)), self.dtype)

    def __del__(self) -> None:
        for file in self.__dict__.get("_open", {}).values():
            file.close()

    def _bytes(self, file: int, start: int, stop: int) -> bytes:
        at, size = start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        try:
            descriptor = self._opened(file).fileno()
            data = os.pread(descriptor, size, at)
            while len(data) < size:  # more than a call gives, or the end of the file
                more = os.pread(descriptor, size - len(data), at + len(data))
                if not more:
                    now = os.fstat(descriptor).st_size
                    raise TransientReadError(f"{self.paths[file]}: damaged or changed: cut to {now:,} bytes")
                data += more
        except OSError as error:
            if file in self._open:
                self._open.pop(file).close()  # the next attempt opens it anew
            raise TransientReadError(f"{self.paths[file]}: cannot be read: {error.strerror}") from None
        else:
            return data
        finally:
            if len(self._open) > self._most_open:
                self._open.pop(next(iter(self._open))).close()

    def _opened(self, file: int) -> BinaryIO:
        found = self._open.pop(file, None) or open_regular(self.paths[file])
        self._open[file] = found
        return found
