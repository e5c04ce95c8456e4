"""Files as they are or unpacked, read as lines or pieces of bounded size: no more of a file is ever held in memory."""

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from p828.files import MEBIBYTE

COMPRESSIONS = (".gz", ".xz", ".zst")
# Besides OSError, what a damaged file raises while it is read, over all compressions.
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
LARGEST_WINDOW = 2**31  # bytes that a .zst may look back, which reading it takes in memory: what `zstd --long=31` makes
PACKED_AT_ONCE = 4096  # bytes of a .zst: they stand for 128 MiB at most, as 4 of them can for 128 KiB
LARGEST_PIECE = 4 * MEBIBYTE  # of a text file that is too large for one document


def unpacked(file: BinaryIO, suffix: str) -> BinaryIO:
    """The content of an opened file whose name has this ending. An empty file is empty with any of them."""
    raw: Any = file
    if os.fstat(file.fileno()).st_size == 0:
        pass
    elif suffix == ".gz":
        raw = gzip.GzipFile(fileobj=io.BufferedReader(raw))
    elif suffix == ".xz":
        raw = lzma.LZMAFile(io.BufferedReader(raw))  # noqa: SIM115  # closed with what wraps it
    elif suffix == ".zst":
        raw = _ZstReader(raw)
    return io.BufferedReader(raw, MEBIBYTE // 8)


class _ZstReader(io.RawIOBase):
    """Frames one after another. Raises EOFError if the last one is cut off, which zstandard's own readers do not."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._frame: Any = None
        self._packed = b""  # what follows the frame that ended last
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(PACKED_AT_ONCE)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._frame, self._packed = None, self._frame.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines with their ends; None for one of more than `limit` bytes, which is passed over in pieces."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(MEBIBYTE)) and not rest.endswith(b"\n"):
            pass
        yield None


def pieces(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """All of it if it has at most `limit` bytes, else pieces of at most 4 MiB, cut behind a line or a word."""
    content = _read(stream, limit + 1)
    if len(content) <= limit:
        yield content
        return
    size = min(limit, LARGEST_PIECE)
    while True:
        while len(content) > size:
            cut = _place_to_cut(content, size)
            yield content[:cut]
            content = content[cut:]
        more = _read(stream, size)
        if not more:
            break
        content += more
    yield content


def _read(stream: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end."""
    content = bytearray()
    while len(content) < count and (data := stream.read(min(count - len(content), MEBIBYTE))):
        content += data
    return bytes(content)


def _place_to_cut(content: bytes, size: int) -> int:
    for end in (b"\n", b" "):
        cut = content.rfind(end, 0, size) + 1
        if cut:
            return cut
    cut = size
    while size - cut < 3 and cut > 1 and content[cut] & 0xC0 == 0x80:  # within a character
        cut -= 1
    return cut
