"""Checkpoints on disk, to be found, verified, opened and deleted: one directory a step, complete or absent.

`step_00000100/` holds the tensors of each part ("model", "optimizer", ...) as `runs.tensors` says, from one process or
from several ranks, `state.json` (progress, data position, metadata), enclosed files as the tokenizer, and
`manifest.json`, which lists all others with size and SHA-256 and has a checksum of its own. Nothing is ever unpickled.

A checkpoint is written as `.step_00000100.tmp` and then renamed. When a step is saved again, the older checkpoint is
first renamed to `.step_00000100.replaced`; one that is to be deleted is first renamed to `.step_00000100.old`. Where
directories cannot be renamed, their files are moved one by one: the manifest is the last file to come and the first to
go, so that a directory with a manifest is complete. `recover` mends what a killed process leaves of all this.

A wrong size, checksum or content is damage. A file that the system fails to read is not, as it may be read later.
"""

import errno
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from p828.config.files import HUB_FILE
from p828.data.retry import NO_RETRY, Retry
from p828.errors import ConfigError, DataError, RunFailed, TransientReadError
from p828.files import directory_near, fsync, move_directory
from p828.runs.file_names import (
    CHECKPOINTS,
    DELETED,
    MANIFEST_FILE,
    QUARANTINED,
    REPLACED,
    SAVING,
    STEP_NAME,
    beside,
    step_of,
)
from p828.runs.manifest import DamagedCheckpoint as DamagedCheckpoint
from p828.runs.manifest import describe, read_manifest, read_state, reading_file
from p828.runs.tensors import Tensors, part_of

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Part ("model", "optimizer", ...) to name to tensor."""
    state: dict[str, Any]


class OpenCheckpoint(NamedTuple):
    """A `Checkpoint` whose tensors are read from its open files one by one."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]
    files: frozenset[str]
    """The files that the checkpoint's manifest lists."""


def load(path: Path, names: Iterable[str] | None = None, device: str = "cpu", retry: Retry = NO_RETRY) -> Checkpoint:
    """Verify a checkpoint and read all its parts, or only those in `names`, onto `device`.

    Raises DamagedCheckpoint, DataError for a part that the checkpoint lacks or a format version that p828 does not
    read, and TransientReadError.
    """
    manifest = verify(path, names, retry)
    wanted = _parts(manifest) if names is None else list(names)
    with opened(path, manifest, wanted, device, retry) as checkpoint:
        tensors = {part: checkpoint.tensors[part] for part in wanted}
    return Checkpoint(path, checkpoint.step, tensors, checkpoint.state)


@contextmanager
def opened(
    path: Path,
    manifest: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
    device: str = "cpu",
    retry: Retry = NO_RETRY,
) -> Iterator[OpenCheckpoint]:
    """Open a checkpoint that was verified before, to read its tensors one by one.

    Raises DamagedCheckpoint and TransientReadError. Errors of the block are raised as they are.
    """
    manifest = manifest or retry.call(partial(read_manifest, path))
    wanted = set(_parts(manifest) if names is None else names)
    state = retry.call(partial(read_state, path))
    files = frozenset(manifest["files"])
    with Tensors(path, sorted(file for file in files if part_of(file) in wanted), device) as tensors:
        yield OpenCheckpoint(path, manifest["step"], tensors, state, files)


def verify(path: Path, names: Iterable[str] | None = None, retry: Retry = NO_RETRY) -> dict[str, Any]:
    """Check the manifest and every file's size and checksum, of the tensors' files only the parts in `names`.

    Returns the manifest. Raises DamagedCheckpoint naming the first file that is wrong, DataError as `load` does, and
    TransientReadError after all attempts.
    """
    return retry.call(partial(_verified_manifest, path, None if names is None else list(names)))


def find_newest(
    directory: Path, last_step: int | None = None, retry: Retry = NO_RETRY
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `directory` up to `last_step`, and a line for each newer one that is damaged.

    Once a complete checkpoint is found, newer damaged ones are renamed to `damaged_step_XXXXXXXX`. This also removes
    what a killed save left, so only the process that trains the run may call it; readers use `resolve`. Raises
    DataError where the system does not let the directory be read or changed, and TransientReadError where it cannot be
    read for now, and then renames nothing.
    """
    damaged: list[tuple[Path, str]] = []
    try:
        recover(directory)
        for path in reversed(_checkpoints(directory)):
            if last_step is not None and step_of(path) > last_step:
                continue
            try:
                verify(path, retry=retry)
            except DamagedCheckpoint as error:
                damaged.append((path, str(error)))
                continue
            return path, [f"{text}; quarantined as {_quarantine(bad).name}" for bad, text in damaged]
    except OSError as error:
        text = f"{directory}: cannot look for checkpoints: {error}"
        raise (DataError(text) if error.errno in REFUSED else TransientReadError(text)) from None
    return None, [text for _, text in damaged]


def _quarantine(path: Path) -> Path:
    aside = _unused(path.with_name(f"{QUARANTINED}{path.name}"))
    move_directory(path, aside)
    return aside


def prune(directory: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the `keep_last` newest checkpoints and that of `best_step`.

    Raises RunFailed when the file system refuses.
    """
    try:
        recover(directory)
        paths = _checkpoints(directory)
        _remove(path for path in paths[: max(len(paths) - keep_last, 0)] if step_of(path) != best_step)
    except OSError as error:
        raise RunFailed(f"{directory}: an old checkpoint cannot be deleted: {error}") from None


def forget_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps. Raises RunFailed when the file system refuses."""
    try:
        _remove(path for path in _checkpoints(directory) if step_of(path) > step)
    except OSError as error:
        raise RunFailed(f"{directory}: a checkpoint cannot be deleted: {error}") from None


def resolve(path: Path) -> Path:
    """The checkpoint that `resolve_with_notes` returns."""
    return resolve_with_notes(path)[0]


def resolve_with_notes(path: Path, retry: Retry = NO_RETRY) -> tuple[Path, list[str]]:
    """The checkpoint that a user names: by its own path, or the newest complete one of a run or its `checkpoints`.

    Also returns a line for each newer checkpoint that is damaged. Changes nothing on disk, so that it is safe while the
    run is training. Raises ConfigError saying what was found instead, and TransientReadError.
    """
    if (path / MANIFEST_FILE).is_file() or (STEP_NAME.fullmatch(path.name) and path.is_dir()):
        return path, []
    if not path.exists():
        advice = directory_near(path) or "give a run's directory or one of its checkpoints"
        raise ConfigError(f"{path}: no such directory; {advice}")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; give a run's directory or one of its checkpoints")
    for entry in (path, path / CHECKPOINTS):
        if entry.is_dir() and not os.access(entry, os.R_OK | os.X_OK):
            raise ConfigError(f"{entry}: no permission to read it")
    linked = path / CHECKPOINTS
    if linked.is_symlink() and not linked.exists():
        raise ConfigError(f"{linked} is a link to {os.readlink(linked)}, which is not there")
    damage: list[str] = []
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    for candidate in reversed(_checkpoints(directory)):
        try:
            verify(candidate, retry=retry)
            return candidate, [f"{text}; {candidate.name} is used instead" for text in damage]
        except DamagedCheckpoint as error:
            if candidate.exists():  # else the run has deleted it meanwhile
                damage.append(str(error))
    if damage:
        raise ConfigError(f"{path} has no complete checkpoint: {damage[0]}")
    if (path / HUB_FILE).is_file():
        raise ConfigError(
            f"{path} is a model in the hub's layout: p828 import {shlex.quote(str(path))} makes a run of it"
        )
    entries = sorted(entry.name for entry in directory.iterdir())
    found = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
    raise ConfigError(
        f"{path} is neither a run with a checkpoint nor a checkpoint; found in {directory.name or directory}: {found}"
    )


def publish(temporary: Path, final: Path) -> None:
    """Rename a checkpoint that is written into place, durably. Raises OSError.

    Between the two renames of a replacement, `recover` restores the older one.
    """
    if final.exists():
        move_directory(final, beside(final, REPLACED), last=MANIFEST_FILE)
    move_directory(temporary, final, last=MANIFEST_FILE)
    fsync(final.parent)


def recover(directory: Path) -> None:
    """Put back or remove what an unfinished save left, and finish deletions. Raises OSError."""
    for path in directory.glob(f".step_*.{REPLACED}"):
        original = directory / path.name[1:].removesuffix(f".{REPLACED}")
        if not path.is_dir():
            path.unlink()
        elif (original / MANIFEST_FILE).exists():
            for name in os.listdir(path):  # where files are moved one by one, some may be moved already
                if not (original / name).exists():
                    os.rename(path / name, original / name)
            _delete(path)
        else:
            if original.exists():
                _delete(original)
            move_directory(path, original, last=MANIFEST_FILE)
    for ending in (SAVING, DELETED):
        for path in directory.glob(f".step_*.{ending}"):
            original = directory / path.name[1:].removesuffix(f".{ending}")
            if original.is_dir() and path.is_dir() and not (original / MANIFEST_FILE).exists():
                _delete(original)  # the files that a killed process had moved
            _delete(path)


def _remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints. Each is renamed first, so that a kill leaves no half of one under a checkpoint's name."""
    for path in paths:
        aside = beside(path, DELETED)
        move_directory(path, aside, first=MANIFEST_FILE)
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _verified_manifest(path: Path, names: list[str] | None) -> dict[str, Any]:
    """The manifest, after a check of it, of the files without tensors and of the parts in `names` (None: all)."""
    manifest = read_manifest(path)
    files = manifest["files"]
    parts = _parts(manifest)
    for name in names or ():
        if name not in parts:
            raise DataError(f"{path}: has no {name}.safetensors; its parts are {', '.join(parts)}")
    for file in files:
        if names is not None and part_of(file) not in (None, *names):
            continue
        with reading_file(path, file):
            size = (path / file).stat().st_size
            if size != files[file]["size"]:
                raise DamagedCheckpoint(f"{path}: {file} has {size} bytes, {files[file]['size']} were written")
            if describe(path / file) != files[file]:
                raise DamagedCheckpoint(f"{path}: {file} is not what was written: its checksum differs")
    return manifest


def _checkpoints(directory: Path) -> list[Path]:
    """The directories with names of checkpoints, by rising step."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)), key=step_of)


def _parts(manifest: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(part for file in manifest["files"] if (part := part_of(file)) is not None))


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}_{number}")
    return candidate
