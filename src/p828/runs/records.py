"""A run's records, `metrics.jsonl`: the format, its writer (`Recorder`) and its reader (`read`).

Every line is an object with `kind` ("step", "eval", "tasks", "sample", "event", ...) and `step`. JSON has no NaN and no
infinity, so these are the strings "NaN", "Infinity" and "-Infinity", which `float()` of Python, pandas and
JavaScript's `Number()` understand.

A step's line has a few numbers a layer about the balance of its experts. Every n steps, and at evaluations, it has the
loads of all experts, too (`loads_record`). Files of earlier versions have the loads in every step's line.
"""

import errno
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, cast

from p828.errors import ConfigError, DataError, RecordsFailed, RunPaused, closed_after
from p828.files import fsync, open_appended, open_regular
from p828.runs.file_names import DAMAGED_RECORDS_FILE, RECORDS_FILE

LOADS_A_STEP = 32  # loads of experts that a step's line has on average at most, without those at evaluations
MOST_STEPS = 2**53  # whole numbers up to here are exact in JSON as others read it
LARGEST = 1e100  # of a number that is finite: float32 ends at 3e38, and sums and squares of these are finite
MEASURED_EVERY = 10  # steps, at least: what takes longer to find, or more room in a line
DIGITS = 4  # of a number that is told by part or layer, and of seconds
STARVED_UNDER = 0.1  # of the mean load of a layer's experts
PIECE = 2**20  # bytes
LONGEST_LINE = 16 * 2**20  # bytes; a step of a thousand layers of a thousand experts takes half of it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)  # a full disk, or one that fails for now
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
REPEATED_KINDS = ("step", "eval", "probe", "tasks", "sample")  # kinds that a resumed run writes again


class Mirror(Protocol):
    """A second place that gets the records, as Weights & Biases. It takes no time and raises nothing."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """The run goes on after `step`: later ones come again."""

    def problems(self) -> list[tuple[str, str]]:
        """Each failure that the run should report, once: which mirror, and a sentence."""
        ...

    def finish(self, exit_code: int) -> None: ...


class Follower(Protocol):
    """What looks at the records as they come, as the rules of run health."""

    def add(self, record: Mapping[str, Any]) -> None: ...


class Recorder:
    """Appends to `run_dir/metrics.jsonl`, and gives every record to the mirror, if there is one.

    Use as a context manager, or call `close`. With `is_quiet`, on all ranks but rank 0, it records nothing. Raises
    ConfigError when the file cannot be written.
    """

    def __init__(self, run_dir: Path, is_quiet: bool = False, mirror: Mirror | None = None) -> None:
        self.is_quiet, self.mirror = is_quiet, mirror
        self.follower: Follower | None = None
        self.waiting: list[bytes] = []
        """Lines for which the disk had no room; they are written as soon as it has."""
        self.path = run_dir / RECORDS_FILE
        self._file: BinaryIO | None = None
        try:
            if not is_quiet:
                run_dir.mkdir(parents=True, exist_ok=True)
                self._file = open_appended(self.path)
                _mend_last_line(self.path)
        except OSError as error:
            raise ConfigError(_unwritable(self.path, error)) from None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line. `values` are JSON values; values of layers are lists with an entry a layer.

        The line is written in one call of the operating system, so that a killed process leaves at most a partial last
        line. On a full disk the line is kept in `waiting`. Raises RecordsFailed where the file cannot be written for
        another reason.
        """
        if self.is_quiet:
            return
        record = encoded({"kind": kind, "step": step, **values})
        self.waiting.append(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        try:
            while self.waiting and self._append(self.waiting[0]):
                del self.waiting[0]
        except OSError as error:
            raise RecordsFailed(_unwritable(self.path, error)) from None
        if self.mirror is not None:
            self.mirror.write(kind, step, values)
        if self.follower is not None:
            self.follower.add({"kind": kind, "step": step, **values})

    def _append(self, line: bytes) -> bool:
        """Append the line, or nothing of it if the disk has no room. Returns whether it had."""
        assert self._file is not None
        end, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(line):  # at the second attempt a full disk says so
                written += self._file.write(line[written:])
        except OSError as error:
            os.truncate(self._file.fileno(), end)
            if error.errno not in NO_ROOM:
                raise
            return False
        return True

    def rewind(self, step: int) -> str:
        """Drop the records that the run will write again when it continues after `step`; lines of other kinds stay.

        Lines that are no records, as a loss of power leaves them, are moved to `metrics.damaged`. Returns a sentence
        about them, or an empty text. Holds one line in memory at a time. A process that is killed leaves the file as it
        was. Raises RecordsFailed when the file cannot be written.
        """
        if self.is_quiet:
            return ""
        beside, damaged = self.path.with_name(f".{RECORDS_FILE}.tmp"), self.path.with_name(DAMAGED_RECORDS_FILE)
        moved = 0
        try:
            beside.unlink(missing_ok=True)  # what a killed process left
            with beside.open("xb") as file:
                for line in _lines(self.path):
                    record = parsed(line)
                    if record is None:
                        with open_appended(damaged) as other:
                            other.write(line)
                        moved += 1
                    elif _is_kept(record, step):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            fsync(self.path.parent)
            self.waiting = [line for line in self.waiting if _is_kept(json.loads(line), step)]
            if self._file is not None:
                self._file.close()
            self._file = open_appended(self.path)
        except OSError as error:
            raise RecordsFailed(_unwritable(self.path, error)) from None
        finally:
            beside.unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.rewind(step)
        lines = "1 line was no record and is" if moved == 1 else f"{moved:,} lines were no records and are"
        return f"{self.path}: {lines} now in {damaged}" if moved else ""

    def close(self, exit_code: int = 0) -> None:
        """Close the file and the mirror, where an `exit_code` other than 0 marks the run as failed."""
        try:
            if self.mirror is not None:
                self.mirror.finish(exit_code)
        finally:
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with closed_after(lambda: self.close(exit_code=0 if error is None or isinstance(error, RunPaused) else 1)):
            if error is not None:
                raise error


def read(path: Path, passed_over: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order. A partial last line, as a killed process leaves it, is left out.

    Raises ConfigError for a file that cannot be read, and DataError naming any other line that is no record. With a
    list `passed_over` such lines are left out, and it gets their numbers, from 1.
    """
    try:
        for number, line in enumerate(_lines(path), start=1):
            record = parsed(line)
            if record is not None:
                yield record
            elif passed_over is not None:
                passed_over.append(number)
            else:
                raise DataError(f"{path}: line {number} is not a record; mend or remove that line")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def shortened(number: Any) -> Any:
    """The number, or those of a list or an object, with DIGITS digits."""
    if isinstance(number, dict):
        return {name: shortened(value) for name, value in number.items()}
    if isinstance(number, list):
        return [shortened(value) for value in number]
    return float(f"{number:.{DIGITS}g}")


def matching(path: Path, pattern: re.Pattern[bytes]) -> Iterator[dict[str, Any]]:
    """The records, in order, in whose lines the pattern is found; other lines are not parsed. Raises ConfigError.

    So records of a few steps are found among 500,000 in a second. A line that is no record is left out.
    """
    try:
        for line in _lines(path):
            if pattern.search(line) and (record := parsed(line)) is not None:
                yield record
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def columns(path: Path, kind: str, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The values under some keys of all records of one kind, and their `step`, a list for each key; None where absent.

    Reads 500,000 lines in some seconds, as only these values are decoded. A line that is no record is left out. Raises
    ConfigError for a file that cannot be read.
    """
    found: dict[str, list[Any]] = {key: [] for key in ("step", *keys)}
    pattern = re.compile(rb'"kind": ?"%s"' % kind.encode())
    try:
        for line in _lines(path):
            if not pattern.search(line):
                continue
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("kind") == kind and type(record.get("step")) is int:
                    for key, values in found.items():
                        values.append(_decode(record.get(key)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return found


def tail(path: Path, most: int) -> list[bytes]:
    """The whole lines in the last `most` bytes, in order, not parsed. Raises ConfigError."""
    try:
        with open_regular(path) as file:
            start = max(os.fstat(file.fileno()).st_size - most, 0)
            file.seek(start)
            content = b"".join(iter(lambda: file.read(PIECE), b""))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return content.split(b"\n")[1 if start else 0 : -1]  # the last one is partial, and the first if it is cut


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if the line is no record."""
    try:
        record = json.loads(line)
        may_have = b'"NaN"' in line or b'Infinity"' in line  # most lines have none, and stay as they are
        if may_have and isinstance(record, dict) and record.get("kind") != "sample":  # of text, which may be "NaN"
            record = _decode(record)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int and "kind" in record
    return record if is_record and 0 <= record["step"] < MOST_STEPS else None


def number(value: Any) -> float | None:
    """A value of a record as a float; None if it is no number, or none that a run writes."""
    if type(value) not in (int, float) or LARGEST < abs(value) < math.inf:
        return None
    return float(value)


def finite_number(value: Any) -> float | None:
    """The same, and None for NaN and the infinities, too."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else None


def loads_every(layers: int, experts: int) -> int:
    """n, where every n-th step's line has the loads of all experts. In a small model n is 1."""
    return math.ceil(layers * experts / LOADS_A_STEP)


def measured_every(layers: int, experts: int) -> int:
    """n, where the first and every n-th step's line has what is told by part of the model, and of each router."""
    return max(MEASURED_EVERY, loads_every(layers, experts))


def loads_record(loads_LE: Sequence[Sequence[int]], is_whole: bool) -> dict[str, list[Any]]:
    """The keys of a step's line about the loads: the tokens that each of E experts got, in each of L layers.

    Each is a list of L: `balance` is `load_entropy`, `min_share` and `max_share` the least and the greatest load over
    the mean load, `starved` the number of experts under a tenth of the mean load. With `is_whole`, `load` has all of
    them. A dead expert is counted in every step's `starved`; the next `load` shows which one it is.
    """
    shares_LE = [[load * len(load_E) / max(sum(load_E), 1) for load in load_E] for load_E in loads_LE]
    found: dict[str, list[Any]] = {"load": [list(load_E) for load_E in loads_LE]} if is_whole else {}
    return found | {
        "balance": [round(load_entropy(load_E), 4) for load_E in loads_LE],
        "min_share": [round(min(share_E), 3) for share_E in shares_LE],
        "max_share": [round(max(share_E), 3) for share_E in shares_LE],
        "starved": [sum(share < STARVED_UNDER for share in share_E) for share_E in shares_LE],
    }


def load_entropy(load_E: Sequence[int]) -> float:
    """Normalised entropy of a layer's loads: 1 if all E experts got equally many tokens, 0 if one got all.

    The entropy of the shares p_e = load_e / sum(load) over its greatest value: -sum(p_e ln p_e) / ln E. Unlike max/mean
    it depends on every expert and not on the busiest alone, and 1 and 0 mean the same for any E. A load of no tokens,
    and that of a single expert, count as even.
    """
    total = sum(load_E)
    if len(load_E) < 2 or total == 0:
        return 1.0
    entropy = -sum(load / total * math.log(load / total) for load in load_E if load)
    return min(max(entropy / math.log(len(load_E)), 0.0), 1.0)


def encoded(value: Any) -> Any:
    """JSON values with the names of NaN and the infinities in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(item) for item in value]
    return value


def _is_kept(record: dict[str, Any], step: int) -> bool:
    """Whether a run that continues after `step` does not write this record again."""
    return record["kind"] not in REPEATED_KINDS or record["step"] <= step


def _mend_last_line(path: Path) -> None:
    """Cut a partial last line off, so that the next one starts on its own."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end = size = os.fstat(descriptor).st_size
        while end:  # from behind, a piece at a time, to the last end of a line
            start = max(end - PIECE, 0)
            found = os.pread(descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(descriptor, end)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> Iterator[bytes]:
    """Each complete line, or piece of LONGEST_LINE bytes of a longer one. Raises OSError."""
    with io.BufferedReader(cast(io.RawIOBase, open_regular(path))) as file:
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                return
            yield line


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _unwritable(path: Path, error: OSError) -> str:
    return f"{error.filename or path}: cannot be written: {error.strerror or error}"
