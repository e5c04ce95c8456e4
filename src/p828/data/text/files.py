"""Shards that lie on this machine: text files, JSON Lines, and the standard library's own source."""

import errno
import glob
import json
import os
import shlex
import sysconfig
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from p828.config.values import shown_path
from p828.data.text.compression import COMPRESSIONS, DAMAGE, lines, pieces, unpacked
from p828.data.text.conversation import conversation_of
from p828.data.text.shard import BadRecord
from p828.data.tokenizer.chat_template import ChatTemplate
from p828.errors import ConfigError, DataError, TransientReadError, reason
from p828.files import open_regular
from p828.system.slow_count import SlowCount

ENDINGS = (".txt", ".py", ".md", ".jsonl")
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
TABLES = {"encodings", "pydoc_data"}  # generated: character maps and the text of the manual
# Errors that a later attempt meets again; EINVAL and ENXIO come from what is no regular file.
FOR_GOOD = (
    errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
LARGEST_DOCUMENT = 16 * 10**6  # bytes, unless the configuration says another number
IDENTIFIED_BY = 4096  # bytes, of a file's beginning and of its end
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_SHOWN = 200  # characters of what was given
READERS = {".csv": "from_csv", ".parquet": "from_parquet"}  # of datasets.Dataset, by the ending of a table


@dataclass(frozen=True)
class PythonShard:
    """One file of the standard library; a file that is not UTF-8 counts as empty."""

    root: Path
    name: str

    @property
    def size(self) -> int:
        return (self.root / self.name).stat().st_size

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.root / self.name,)

    def identity(self, with_contents: bool) -> str:
        return f"{self.name} {self.size}"

    def prefix(self, records: int) -> str:
        return ""

    def fraction_read(self) -> float:
        return 0.0

    def documents(self, start: int = 0) -> Iterator[str]:
        """Raises TransientReadError."""
        if start > 0:
            return
        try:
            yield (self.root / self.name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            yield ""
        except OSError as error:
            raise TransientReadError(f"{self.root / self.name}: cannot be read: {reason(error)}") from None


@dataclass
class FileShard:
    """One local file: a JSON Lines file holds a document a line, any other file is one, or several if it is large."""

    name: str
    text_field: str
    limit: int = LARGEST_DOCUMENT
    """Bytes of a document: a longer line is a bad record, a larger text file is read in pieces."""
    skips: bool = False
    """Whether bad records are given in the place of texts, and not raised."""
    template: ChatTemplate | None = None
    """If given, `text_field` holds the messages of a conversation, and a document is its marked text."""
    _open: BinaryIO | None = field(default=None, repr=False, compare=False)
    _given: int = field(default=0, repr=False, compare=False)
    """Bytes of the records so far."""

    @property
    def size(self) -> int:
        try:
            return Path(self.name).stat().st_size
        except OSError as error:
            raise self._unreadable(error) from None

    @property
    def ending(self) -> str:
        """One of `ENDINGS`: the name's, without that of a compression."""
        return _ending(Path(self.name))

    @property
    def has_lines(self) -> bool:
        """Whether it holds a record a line; otherwise the whole file is one document."""
        return self.ending == ".jsonl"

    @property
    def paths(self) -> tuple[Path, ...]:
        return (Path(self.name),)

    def identity(self, with_contents: bool) -> str:
        """Name, size and, if wanted, a checksum of the first and last bytes."""
        try:
            return file_identity(Path(self.name), with_contents)
        except OSError as error:
            raise self._unreadable(error) from None

    def prefix(self, records: int) -> str:
        checksum, count = xxhash.xxh3_64(), 0
        with closing(self._records()) as all_records:
            while count < records and (record := next(all_records, b"")):
                checksum.update(record)
                count += 1
        return f"{count} {checksum.hexdigest()}"

    def documents(self, start: int = 0) -> Iterator[str | BadRecord]:
        """Raises DataError naming the wrong file, of JSON Lines also the line, and TransientReadError."""
        with closing(self._records()) as records:
            for number, record in enumerate(records):
                if number < start:
                    continue
                try:
                    text = self._line(record, number) if self.has_lines else self._text(record, number)
                except BadRecord as bad:
                    if not self.skips:
                        raise
                    yield bad
                else:
                    yield text

    def fraction_read(self) -> float:
        if self._open is None or self._open.closed:
            return 0.0 if self._open is None else 1.0
        is_packed = Path(self.name).suffix in COMPRESSIONS
        place = self._open.tell() if is_packed else self._given  # without what a buffer has read ahead
        return place / max(os.fstat(self._open.fileno()).st_size, 1)

    def _records(self) -> Generator[bytes | None, None, None]:
        """Lines, or pieces; None for a line that is too long. Raises DataError and TransientReadError."""
        try:
            with open_regular(Path(self.name)) as self._open, unpacked(self._open, Path(self.name).suffix) as stream:
                self._given = 0
                for record in lines(stream, self.limit) if self.has_lines else pieces(stream, self.limit):
                    self._given += len(record or b"")
                    yield record
        except (OSError, *DAMAGE) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DataError | TransientReadError:
        kind = TransientReadError if _may_pass(error) else DataError
        return kind(f"{self.name}: cannot be read: {reason(error)}")

    def _text(self, record: bytes | None, number: int) -> str:
        assert record is not None
        try:
            text = _decoded(record, number)
        except UnicodeDecodeError as error:
            raise BadRecord(f"{self.name}: cannot be read: {_not_utf8(error)}", number) from None
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _line(self, record: bytes | None, number: int) -> str:
        where = f"{self.name}:{number + 1}"
        if record is None:
            raise BadRecord(
                f"{where}: a line of more than data.max_document_megabytes = {self.limit / 10**6:g} is not accepted",
                number,
            )
        try:
            line = _decoded(record, number)
        except UnicodeDecodeError as error:
            raise BadRecord(f"{where}: not UTF-8: {_not_utf8(error)}", number) from None
        if not line.strip():
            return ""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where}: not a line of JSON: {error}", number) from None
        if self.template is not None:
            return conversation_of(fields, self.text_field, self.template, where, number)
        return text_of(fields, self.text_field, where, number)


def file_identity(path: Path, with_contents: bool) -> str:
    """A file's name, size and, if wanted, a checksum of its first and last bytes. Raises OSError."""
    size = path.stat().st_size
    known = f"{path.name} {size}"
    if not with_contents:
        return known
    with open_regular(path) as file:
        head = file.read(IDENTIFIED_BY)
        file.seek(max(size - IDENTIFIED_BY, 0))
        return f"{known} {xxhash.xxh3_64_hexdigest(head + file.read(IDENTIFIED_BY))}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"{error}; save it as UTF-8, as iconv does"


def text_of(fields: object, text_field: str, where: str, record: int) -> str:
    """The document in one JSON object or hub row. Raises BadRecord naming the place and the fields that exist."""
    if not isinstance(fields, dict):
        raise BadRecord(
            f"{where}: a JSON object with the field {text_field!r} is accepted, not {type(fields).__name__}", record
        )
    if text_field not in fields:
        existing = ", ".join(map(str, fields))[:200] or "none"
        raise BadRecord(f"{where}: no field {text_field!r} (data.text_field); fields here: {existing}", record)
    text = fields[text_field]
    if not isinstance(text, str):
        raise BadRecord(
            f"{where}: field {text_field!r} (data.text_field) holds {type(text).__name__}, not text", record
        )
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


def file_shards(
    globs: tuple[str, ...],
    text_field: str,
    key: str,
    limit: int = LARGEST_DOCUMENT,
    skips: bool = False,
    report: Callable[[str], None] = lambda text: None,
    template: ChatTemplate | None = None,
) -> list[FileShard]:
    """The files that are named, match or lie in a directory that is named, each once, in the order of their paths.

    `key` is the setting that holds the globs. `report` is given a line now and then while looking takes long. With a
    `template`, documents are conversations. Raises ConfigError naming a glob that matches no file, a directory without
    one, a link to what is not there, and a file whose ending is not supported.
    """
    found: dict[str, str] = {}  # by where a file really is: the name that it was found under
    names = [name for pattern in globs for name in _matches(pattern, key, report)]
    for name in sorted(names, key=os.path.abspath):
        found.setdefault(os.path.realpath(name), name)
    for name in found.values():
        if not _is_accepted(name):
            raise ConfigError(f"{key}: {name}: files ending in {_accepted()}{_recipe([name])}")
    shards = [FileShard(name, text_field, limit, skips, template) for name in found.values()]
    if template is not None and (other := next((shard for shard in shards if not shard.has_lines), None)):
        raise ConfigError(f"{key}: {other.name}: with data.messages_field, .jsonl files are accepted, a line for each")
    return shards


def _matches(pattern: str, key: str, report: Callable[[str], None]) -> list[str]:
    """The files of a path, or of a glob if no such path exists. Raises ConfigError if there are none."""
    path, shown = os.path.expanduser(pattern), repr(pattern[:LONGEST_SHOWN])
    if not pattern.strip():
        raise ConfigError(f"{key}: {shown} names nothing: the path of a file or directory, or a glob, is accepted")
    if os.path.isfile(path):
        return [str(Path(path))]
    if os.path.isdir(path):
        return _files_below(path, f"{key}: {shown}", report)
    if os.path.exists(path):
        raise ConfigError(f"{key}: {shown} is neither a regular file nor a directory")
    looked_at = SlowCount(report, f"{_plain(f'{key}: {shown}')}: looking for text: {{:,}} files so far")
    matches = []
    try:
        for name in glob.iglob(str(Path(path)), recursive=True):
            matches.append(name)
            looked_at.to(len(matches))
    except (OSError, ValueError) as error:  # a name that is too long, or no glob
        raise ConfigError(f"{key}: {shown}: {str(error)[:LONGEST_SHOWN]}") from None
    for name in matches:
        _check_link(name, f"{key}: {shown}")
    files = [name for name in matches if os.path.isfile(name)]
    if not files:
        what = f", but {matches[0]}, which is no regular file" if matches else ""
        raise ConfigError(f"{key}: {shown} matches no file{what}")
    return files


def _files_below(directory: str, where: str, report: Callable[[str], None]) -> list[str]:
    """The supported files of a directory and those in it, without hidden ones. Raises ConfigError if there are none,
    and as `_check_link`.
    """
    found: list[str] = []
    others: list[str] = []
    looked_at = SlowCount(report, f"{_plain(where)}: looking for text: {{:,}} files so far")
    for here, subdirectories, files in os.walk(directory):
        looked_at.to(len(found))
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(here, name)
            if _is_accepted(name):
                _check_link(path, where)
            (found if _is_accepted(name) and os.path.isfile(path) else others).append(path)
    if not found:
        there = ", ".join(others[:3])[:LONGEST_SHOWN] + (" and so on" if len(others) > 3 else "") or "no file"
        raise ConfigError(f"{where}: there is {there} in it; files ending in {_accepted()}{_recipe(others)}")
    return found


def _check_link(path: str, where: str) -> None:
    """Raises ConfigError for a link to what is not there: text that was meant to be read would be missing."""
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(
            f"{where}: {shown_path(path)} is a link to {shown_path(os.readlink(path))}, which is not there"
        )


def _plain(text: str) -> str:
    """Text within a format string."""
    return text.replace("{", "{{").replace("}", "}}")


def _is_accepted(name: str) -> bool:
    return _ending(Path(name)) in ENDINGS


def _accepted() -> str:
    return f"{', '.join(ENDINGS)} are accepted, also with {', '.join(COMPRESSIONS)}"


def _recipe(names: Sequence[str]) -> str:
    """A line with a command that makes lines of JSON of the first table among these files; empty without a table."""
    tables = ((Path(name), READERS.get(Path(name).suffix.lower())) for name in names)
    path, reader = next(((path, reader) for path, reader in tables if reader), (Path(), ""))
    if not reader:
        return ""
    program = f"import datasets, sys; datasets.Dataset.{reader}(sys.argv[1]).to_json(sys.argv[2])"
    command = shlex.join(["python", "-c", program, str(path), str(path.with_suffix(".jsonl"))])
    return f"\nA line of JSON for each row of it: {command}"


def _may_pass(error: Exception) -> bool:
    """Whether a later attempt may succeed. The errors of a damaged file carry no errno, and it cannot."""
    return isinstance(error, OSError) and error.errno not in (None, *FOR_GOOD)


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _decoded(record: bytes, number: int) -> str:
    return (record.removeprefix(BYTE_ORDER_MARK) if number == 0 else record).decode("utf-8")
