"""Writing a checkpoint: all of it or nothing, from one process or several."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from p828.distributed.group import ProcessGroup
from p828.errors import RunFailed
from p828.files import fsync
from p828.runs import checkpoint
from p828.runs.file_names import MANIFEST_FILE, SAVING, STATE_FILE, beside, name_of
from p828.runs.manifest import FORMAT_VERSION, LARGEST_JSON, describe, manifest_bytes, state_bytes
from p828.runs.tensors import Saveable, file_name, tensors_of, write_tensors

T = TypeVar("T")


class CheckpointWriter:
    """A checkpoint on its way to `directory/step_XXXXXXXX`; one of the same step is replaced.

    All `ranks` make one, `write`, and `publish` once everyone has written. Tensors may be of any dtype and device,
    non-contiguous, or share memory (each is written in full). `state` is the first rank's and holds JSON values; tuples
    come back as lists, and floats may be NaN or infinite. `enclosed` are other files, the first rank's, by name.
    Making one and publishing raise RunFailed, on all ranks and with nothing left behind, when the file system refuses
    (full, read-only, ...).
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Saveable]],
        state: Mapping[str, Any],
        ranks: ProcessGroup,
        enclosed: Mapping[str, bytes] | None = None,
    ) -> None:
        self.step, self.tensors, self.ranks = step, tensors, ranks
        self.final = directory / name_of(step)
        self._temporary = beside(self.final, SAVING)
        self._small = {**(enclosed or {}), STATE_FILE: state_bytes(state)}
        self._needed = sum(map(len, self._small.values())) + sum(ranks.all_gather_object(num_bytes(tensors)))
        self._files: dict[str, Any] = {}
        self._refusal: OSError | None = None
        ranks.on_rank_0(lambda: self._refusals(lambda: _begin(self._temporary)))

    def write(self) -> None:
        """This rank's files. What the file system refuses is for `publish` to raise, on all ranks."""
        try:
            self._files = _write_own(self._temporary, self.tensors, self.ranks)
        except OSError as error:
            self._refusal = error
        except MemoryError:
            self._refusal = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def publish(self) -> Path:
        """Make it one that is found, durably, and return its path."""
        failure: RunFailed | None = None
        try:
            with self.ranks.raise_together():
                self._refusals(self._raise_refusal)
            files = {
                name: about for files in self.ranks.all_gather_object(self._files) for name, about in files.items()
            }
            self.ranks.on_rank_0(lambda: self._refusals(lambda: self._complete(files)))
        except RunFailed as error:  # all ranks have it
            failure = error
        self.ranks.on_rank_0(lambda: self._refusals(lambda: checkpoint.recover(self.final.parent)))
        if failure is not None:
            raise failure
        return self.final

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _complete(self, files: dict[str, Any]) -> None:
        state_size = len(self._small[STATE_FILE])
        if state_size > LARGEST_JSON:
            raise OSError(errno.EFBIG, f"{STATE_FILE} would have {state_size:,} bytes of {LARGEST_JSON:,}")
        for name, content in self._small.items():
            _write_new(self._temporary / name, content)
            files[name] = describe(self._temporary / name)
        manifest = manifest_bytes({"format_version": FORMAT_VERSION, "step": self.step, "files": files})
        _write_new(self._temporary / MANIFEST_FILE, manifest)
        fsync(self._temporary)
        checkpoint.publish(self._temporary, self.final)

    def _refusals(self, function: Callable[[], T]) -> T:
        """What the function gives. Raises RunFailed for what the file system refuses."""
        try:
            return function()
        except OSError as error:
            raise RunFailed(
                f"{self.final}: the checkpoint cannot be saved: {error.strerror or error}; "
                f"it needs about {_readable(self._needed)}{_free_space(self.final.parent)}"
            ) from None


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Saveable]],
    state: Mapping[str, Any],
    ranks: ProcessGroup | None = None,
    enclosed: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint as `CheckpointWriter` says, and return its path."""
    writer = CheckpointWriter(directory, step, tensors, state, ranks or ProcessGroup(), enclosed)
    writer.write()
    return writer.publish()


def num_bytes(tensors: Mapping[str, Mapping[str, Saveable]]) -> int:
    """What they take in a file."""
    values = (value for part in tensors.values() for value in part.values())
    return sum(tensor.nbytes for value in values for tensor in tensors_of(value))


def _begin(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.recover(temporary.parent)
    temporary.mkdir()


def _write_own(temporary: Path, tensors: Mapping[str, Mapping[str, Saveable]], ranks: ProcessGroup) -> dict[str, Any]:
    """One rank's files, and what the manifest says of them."""
    files: dict[str, Any] = {}
    for part, values in tensors.items():
        path = temporary / file_name(part, ranks.rank, ranks.size)
        files[path.name] = write_tensors(path, values)
    return files


def _write_new(path: Path, content: bytes) -> None:
    """Durably."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _free_space(directory: Path) -> str:
    try:
        return f", {_readable(shutil.disk_usage(directory).free)} are free"
    except OSError:
        return ""


def _readable(count: int) -> str:
    exponent = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**exponent:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[exponent]}"
