"""Shards that lie on this machine: text files, JSON Lines, and the standard library's own source."""

import errno
import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from p828.errors import ReadFailed, UserError

ENDINGS = (".txt", ".py", ".md", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
TABLES = {"encodings", "pydoc_data"}  # generated: character maps and the text of the manual
FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EISDIR)  # what waiting does not mend
# What a damaged, unreadable or wrongly named file raises while it is read, over all compressions.
READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class PythonShard:
    """One file of the standard library; a file that is not UTF-8 counts as empty."""

    root: Path
    name: str

    @property
    def size(self) -> int:
        return (self.root / self.name).stat().st_size

    def share_read(self) -> float:
        return 0.0

    def documents(self, start: int = 0) -> Iterator[str]:
        """Raises ReadFailed."""
        if start > 0:
            return
        try:
            yield (self.root / self.name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            yield ""
        except OSError as error:
            raise ReadFailed(f"{self.root / self.name}: cannot be read: {error}") from None


@dataclass
class FileShard:
    """One local file: a JSON Lines file holds a document a line, any other file is one document."""

    name: str
    text_field: str
    _open: BinaryIO | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        return Path(self.name).stat().st_size

    def documents(self, start: int = 0) -> Iterator[str]:
        """Raises UserError naming the file, and the line of a JSON Lines file, that is wrong, and ReadFailed."""
        try:
            with Path(self.name).open("rb") as self._open, _as_text(self._open, Path(self.name)) as file:
                if _ending(Path(self.name)) == ".jsonl":
                    yield from self._lines(file, start)
                elif start == 0:
                    yield file.read()
        except READ_ERRORS as error:
            kind = ReadFailed if _may_pass(error) else UserError
            raise kind(f"{self.name}: cannot be read: {error}") from None

    def share_read(self) -> float:
        if self._open is None or self._open.closed:
            return 0.0 if self._open is None else 1.0
        return self._open.tell() / max(os.fstat(self._open.fileno()).st_size, 1)

    def _lines(self, file: TextIO, start: int) -> Iterator[str]:
        for number, line in enumerate(file):
            if number < start:
                continue
            if not line.strip():
                yield ""
                continue
            where = f"{self.name}:{number + 1}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a line of JSON: {error}") from None
            yield text_of(fields, self.text_field, where)


def text_of(fields: object, text_field: str, where: str) -> str:
    """The document in one JSON object or hub row. Raises UserError naming the place and the fields that exist."""
    if not isinstance(fields, dict):
        raise UserError(
            f"{where}: a JSON object with the field {text_field!r} is accepted, not {type(fields).__name__}"
        )
    if text_field not in fields:
        existing = ", ".join(map(str, fields))[:200] or "none"
        raise UserError(f"{where}: no field {text_field!r} (data.text_field); fields here: {existing}")
    text = fields[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} (data.text_field) holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and no tokenizer takes
        return text.encode("utf-8", "replace").decode()
    return text


def python_shards() -> list[PythonShard]:
    """The .py files of this interpreter's standard library, without tests, generated tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    names: list[Path] = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = set(subdirectories) - NOT_SOURCE - TABLES
        here = Path(directory).relative_to(root)
        python = (here / file for file in files if file.endswith(".py"))
        names += [name for name in python if os.access(root / name, os.R_OK)]  # not links to what is not there
    return [PythonShard(root, name.as_posix()) for name in sorted(names)]


def file_shards(globs: tuple[str, ...], text_field: str, key: str) -> list[FileShard]:
    """The files that match, each once, sorted. `key` is the setting that holds the globs.

    Raises UserError naming a glob that matches no file, and a file whose ending is not supported.
    """
    names: set[str] = set()
    for pattern in globs:
        matches = [name for name in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(name).is_file()]
        if not matches:
            raise UserError(f"{key}: {pattern!r} matches no file")
        names.update(matches)
    for name in sorted(names):
        if _ending(Path(name)) not in ENDINGS:
            raise UserError(
                f"{key}: {name}: files ending in {', '.join(ENDINGS)} are accepted, also with {', '.join(COMPRESSIONS)}"
            )
    return [FileShard(name, text_field) for name in sorted(names)]


def _may_pass(error: Exception) -> bool:
    """Whether an error of reading may be gone in a while, as a damaged file's is not: those carry no errno."""
    return isinstance(error, OSError) and error.errno not in (None, *FOR_GOOD)


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _as_text(file: BinaryIO, path: Path) -> TextIO:
    raw: Any = file
    if path.suffix == ".gz":
        raw = gzip.GzipFile(fileobj=file)
    elif path.suffix == ".xz":
        raw = lzma.LZMAFile(file)  # noqa: SIM115  # closed with what wraps it
    elif path.suffix == ".zst":
        # Of the readers for .zst this one alone reports a truncated file; pyarrow comes with `datasets`.
        import pyarrow

        raw = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    # JSON Lines end at \n alone; in prose \r\n becomes \n.
    newline = "\n" if _ending(path) == ".jsonl" else None
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)
