"""A run's one record, `metrics.jsonl`, and its mirror in Weights & Biases.

Every line is an object with `kind` ("step", "eval", "sample", "event", ...) and `step`. JSON has no NaN and no
infinity, so these are the strings "NaN", "Infinity" and "-Infinity", which `float()` of Python, pandas and
JavaScript's `Number()` understand.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from p828.config import Config
from p828.errors import UserError
from p828.train.wandb_mirror import WandbMirror

FILE_NAME = "metrics.jsonl"
LONGEST_LINE = 16 * 2**20  # bytes; a step of a thousand layers of a thousand experts has half of it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)  # or not for now
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
REPEATED_KINDS = ("step", "eval", "sample")  # a resumed run writes these again


class Recorder:
    """Appends to `run_dir/metrics.jsonl`, and to Weights & Biases if the configuration asks for it.

    Use as a context manager, or call `close`. A quiet one, for ranks but the first, records nothing. Raises UserError
    when the file cannot be written or W&B refuses.
    """

    def __init__(self, run_dir: Path, config: Config, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self.waiting: list[bytes] = []
        """Lines for which there was no room on the disk; they are written when there is."""
        self.path = Path(os.devnull) if is_quiet else run_dir / FILE_NAME
        try:
            if not is_quiet:
                run_dir.mkdir(parents=True, exist_ok=True)
                _mend_last_line(self.path)
            self._file = _open(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        is_mirrored = config.wandb.mode != "off" and not is_quiet
        self.wandb = WandbMirror(run_dir, config) if is_mirrored else None

    def update(self, config: Config) -> None:
        """Tell Weights & Biases what of the configuration was settled since."""
        if self.wandb is not None:
            self.wandb.update(config)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line. `values` are JSON values: loads and balance scores are lists with an entry a layer.

        The line goes out in one call of the operating system, so a killed process leaves at most a partial last line.
        On a full disk it waits for room.
        """
        line = json.dumps(_encode({"kind": kind, "step": step, **values}), allow_nan=False) + "\n"
        self.waiting.append(line.encode())
        try:
            while self.waiting and self._append(self.waiting[0]):
                del self.waiting[0]
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if self.wandb is not None:
            self.wandb.write(kind, step, values)

    def _append(self, line: bytes) -> bool:
        """Whether there was room for the line, of which else nothing is written."""
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

    def rewind(self, step: int) -> None:
        """Drop what the run will write again when it continues after `step`; lines of other kinds stay."""
        if self.is_quiet:
            return
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                for line, record in _records(self.path):
                    if _is_kept(record, step):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self.waiting = [line for line in self.waiting if _is_kept(json.loads(line), step)]
            self._file.close()
            self._file = _open(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(self.path, error) from None

    def close(self, exit_code: int = 0) -> None:
        """`exit_code` other than 0 marks the run as failed in Weights & Biases."""
        self._file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if error is None else 1)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, in order; a partial last line, which a killed process leaves, is left out.

    Raises UserError naming the line for anything else that is no record.
    """
    for _, record in _records(path):
        yield record


def balance_score(load_E: Sequence[int]) -> float:
    """How evenly a layer's tokens went to its E experts: 1 perfectly even, 0 all on one.

    The entropy of the shares p_e = load_e / sum(load) over its greatest value: -sum(p_e ln p_e) / ln E.
    Unlike max/mean it sees every expert and not the busiest alone, and 1 and 0 mean the same for any E.
    An empty load, as one expert has, is even.
    """
    total = sum(load_E)
    if len(load_E) < 2 or total == 0:
        return 1.0
    entropy = -sum(load / total * math.log(load / total) for load in load_E if load)
    return min(max(entropy / math.log(len(load_E)), 0.0), 1.0)


def _is_kept(record: dict[str, Any], step: int) -> bool:
    """Whether a run that goes on after `step` does not write it again."""
    return record["kind"] not in REPEATED_KINDS or record["step"] <= step


def _open(path: Path) -> BinaryIO:
    return open(path, "ab", buffering=0)


def _mend_last_line(path: Path) -> None:
    """Cut a partial last line off, so that the next one starts on its own."""
    if not path.exists():
        return
    complete = 0
    with path.open("rb") as file:
        for line in file:
            complete += len(line) if line.endswith(b"\n") else 0
    os.truncate(path, complete)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line and what it says."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return
                yield line, _parse(line, f"{path}: line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and record.get("kind") != "sample":  # these are texts, and a text may be "NaN"
            record = _decode(record)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        raise UserError(f"{where} is not a record; mend or remove that line")
    return record


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror or error}")
