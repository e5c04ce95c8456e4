"""Checkpoints on disk: one directory a step, complete or absent, every byte of it under a checksum.

`step_00000100/` holds the tensors of each part ("model", "optimizer", ...) as `tensor_files` says, from one process or
from several ranks, `state.json` (progress, data position, metadata) and `manifest.json`, which lists the others with
size and SHA-256 and is itself checksummed. Nothing is ever unpickled.

A checkpoint is written as `.step_00000100.tmp` and renamed. A step that is saved again is first renamed to
`.step_00000100.replaced`. One that is deleted is renamed to `.step_00000100.old` first.
What a killed process leaves of these is mended at the next save, search or pruning.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from p828.errors import UserError
from p828.files import MEBIBYTE, read_limited
from p828.train.tensor_files import Tensors, part_of

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step_(\d{8,})")
NON_FINITE = "$float"  # key of the object that stands for a float that JSON does not have
FILE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
LARGEST_JSON = 8 * MEBIBYTE
READ_BYTES = 8 * 2**20


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: the message names it, the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Part ("model", "optimizer", ...) to name to tensor."""
    state: dict[str, Any]


class OpenCheckpoint(NamedTuple):
    """A `Checkpoint` whose tensors are still on disk."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]


def load(path: Path, names: Iterable[str] | None = None, device: str = "cpu") -> Checkpoint:
    """Read a checkpoint, all its parts or only those in `names`, onto `device`; what is read is verified first.

    Raises DamagedCheckpoint, or UserError for a part that it does not have or a version that is not read.
    """
    manifest = _verified_manifest(path, names)
    wanted = _parts(manifest) if names is None else list(names)
    with opened(path, manifest, wanted, device) as checkpoint:
        tensors = {part: checkpoint.tensors[part] for part in wanted}
    return Checkpoint(path, checkpoint.step, tensors, checkpoint.state)


@contextmanager
def opened(
    path: Path, manifest: Mapping[str, Any] | None = None, names: Iterable[str] | None = None, device: str = "cpu"
) -> Iterator[OpenCheckpoint]:
    """A checkpoint that was verified before, its tensors to be read one by one. Raises DamagedCheckpoint."""
    manifest = manifest or _read_manifest(path)
    wanted = set(_parts(manifest) if names is None else names)
    try:
        state = json.loads(read_limited(path / STATE, LARGEST_JSON), object_hook=_decode)
        files = [file for file in manifest["files"] if part_of(file) in wanted]
        with Tensors(path, files, device) as tensors:
            yield OpenCheckpoint(path, manifest["step"], tensors, state)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from None


def verify(path: Path) -> None:
    """Check the manifest and every file's size and checksum. Raises DamagedCheckpoint for the first that is wrong."""
    _verified_manifest(path, None)


def find_newest(directory: Path, last_step: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `directory`, and a line for each damaged one that was met and set aside.

    With `last_step`, the newest up to that step.

    A damaged checkpoint is renamed to `damaged_step_XXXXXXXX` and the one before is tried. Only the process that
    trains the run may call this (it also removes what a killed save left); readers use `resolve`.
    """
    notes: list[str] = []
    try:
        recover(directory)
        for path in reversed(_checkpoints(directory)):
            if last_step is not None and step_of(path) > last_step:
                continue
            try:
                verify(path)
                return path, notes
            except DamagedCheckpoint as error:
                aside = _unused(path.with_name(f"damaged_{path.name}"))
                path.rename(aside)
                notes.append(f"{error}; set aside as {aside.name}")
    except OSError as error:
        raise UserError(f"{directory}: cannot look for checkpoints: {error}") from None
    return None, notes


def prune(directory: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the `keep_last` newest checkpoints and that of `best_step`.

    Raises UserError when the file system refuses.
    """
    try:
        recover(directory)
        paths = _checkpoints(directory)
        _remove(path for path in paths[: max(len(paths) - keep_last, 0)] if step_of(path) != best_step)
    except OSError as error:
        raise UserError(f"{directory}: an old checkpoint cannot be deleted: {error}") from None


def forget_after(directory: Path, step: int) -> None:
    """Delete those of later steps, as `prune` does."""
    try:
        _remove(path for path in _checkpoints(directory) if step_of(path) > step)
    except OSError as error:
        raise UserError(f"{directory}: a checkpoint cannot be deleted: {error}") from None


def resolve(path: Path) -> Path:
    """The checkpoint that a user means by a run's directory (its newest complete one), its `checkpoints`, or itself.

    Changes nothing on disk, so it is safe beside a running training. Raises UserError saying what was found instead.
    """
    if (path / MANIFEST).is_file() or (STEP_NAME.fullmatch(path.name) and path.is_dir()):
        return path
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run's directory or one of its checkpoints")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a run's directory or one of its checkpoints")
    for entry in (path, path / "checkpoints"):
        if entry.is_dir() and not os.access(entry, os.R_OK | os.X_OK):
            raise UserError(f"{entry}: no permission to read it")
    damage: list[str] = []
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in reversed(_checkpoints(directory)):
        try:
            verify(candidate)
            return candidate
        except DamagedCheckpoint as error:
            damage.append(str(error))
    if damage:
        raise UserError(f"{path} has no complete checkpoint: {damage[0]}")
    entries = sorted(entry.name for entry in directory.iterdir())
    found = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
    raise UserError(
        f"{path} is neither a run with a checkpoint nor a checkpoint; found in {directory.name or directory}: {found}"
    )


def recover(directory: Path) -> None:
    """Put back or remove what an unfinished save left, and finish deletions."""
    for path in directory.glob(".step_*.replaced"):
        original = directory / path.name[1:].removesuffix(".replaced")
        if original.exists():
            _delete(path)
        else:
            path.rename(original)
    for ending in ("tmp", "old"):
        for path in directory.glob(f".step_*.{ending}"):
            _delete(path)


def _remove(paths: Iterable[Path]) -> None:
    """Each is renamed before it is emptied, so that a kill never leaves half of what looks like a checkpoint."""
    for path in paths:
        aside = path.rename(path.with_name(f".{path.name}.old"))
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _verified_manifest(path: Path, names: Iterable[str] | None) -> dict[str, Any]:
    """The manifest, after checking it, `state.json` and the parts in `names` (None: every file)."""
    manifest = _read_manifest(path)
    files = manifest["files"]
    if names is None:
        checked = list(files)
    else:
        for name in names:
            if name not in _parts(manifest):
                raise UserError(f"{path}: has no {name}.safetensors; its parts are {', '.join(_parts(manifest))}")
        checked = [STATE, *(file for file in files if part_of(file) in set(names))]
    for file in checked:
        try:
            size = (path / file).stat().st_size
            if size != files[file]["size"]:
                raise DamagedCheckpoint(f"{path}: {file} has {size} bytes, {files[file]['size']} were written")
            if describe(path / file) != files[file]:
                raise DamagedCheckpoint(f"{path}: {file} is not what was written: its checksum differs")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: {file} is missing") from None
        except PermissionError as error:
            raise UserError(f"{path}: {file} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {file} cannot be read: {error.strerror}") from None
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's fields without its checksum. Later versions keep the checksum, so damage is told from newness."""
    try:
        content = read_limited(path / MANIFEST, LARGEST_JSON)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is missing") from None
    except PermissionError as error:
        raise UserError(f"{path}: {MANIFEST} cannot be read: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} cannot be read: {error}") from None
    try:
        manifest: dict[str, Any] = json.loads(content)
        del manifest["sha256"]
        intact = manifest_bytes(manifest) == content
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is not what was written: its checksum differs")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: its checkpoint format is {manifest.get('format_version')}; "
            f"this version of p828 reads format {FORMAT_VERSION}"
        )
    if not _is_manifest(manifest):
        raise DamagedCheckpoint(f"{path}: {MANIFEST} does not say what a checkpoint's does")
    return manifest


def _is_manifest(fields: Mapping[str, Any]) -> bool:
    """Whether it lists files by plain names, with their sizes and checksums; anyone can make the sum over it right."""
    files = fields.get("files")
    return (
        type(fields.get("step")) is int
        and isinstance(files, dict)
        and STATE in files
        and all(FILE_NAME.fullmatch(name) for name in files)
        and all(isinstance(about, dict) and about.keys() == {"size", "sha256"} for about in files.values())
        and all(type(about["size"]) is int and isinstance(about["sha256"], str) for about in files.values())
    )


def manifest_bytes(fields: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, checksum included: any other bytes are damage."""
    content = json.dumps(fields, sort_keys=True).encode()
    return json.dumps({**fields, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True, indent=2).encode()


def describe(path: Path, sync: bool = False) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
        if sync:
            os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _checkpoints(directory: Path) -> list[Path]:
    """The directories that are named as checkpoints, by rising step."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)), key=step_of)


def name_of(step: int) -> str:
    """The name of a step's checkpoint directory."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(path.name.removeprefix("step_"))


def _parts(manifest: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(part for file in manifest["files"] if (part := part_of(file)) is not None))


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}_{number}")
    return candidate


def _decode(value: dict[str, Any]) -> Any:
    return float(value[NON_FINITE]) if value.keys() == {NON_FINITE} else value
