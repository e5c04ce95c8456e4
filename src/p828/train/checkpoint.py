"""Checkpoints on disk: one directory a step, complete or absent, every byte of it under a checksum.

`step_00000100/` holds a `NAME.safetensors` for each part ("model", "optimizer", ...), `state.json` (schedule,
data position, metadata) and `manifest.json`, which lists the others with size and SHA-256 and is itself
checksummed. Nothing is ever unpickled.

A checkpoint is written as `.step_00000100.tmp` and renamed. A step that is saved again is first renamed to
`.step_00000100.replaced`. What a killed process leaves of either is mended at the next save, search or pruning.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p828.errors import UserError
from p828.whole_file import sync

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step_(\d{8,})")
NON_FINITE = "$float"  # key of the object that stands for a float that JSON does not have
READ_BYTES = 8 * 2**20


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: the message names it, the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """Part ("model", "optimizer", ...) to name to tensor."""
    state: dict[str, Any]


def save(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `directory/step_XXXXXXXX` and return its path; a checkpoint of the same step is replaced.

    Tensors may be of any dtype and device, non-contiguous, or share memory (each is written in full). `state` holds
    JSON values; tuples come back as lists, and floats may be NaN or infinite.
    Raises UserError, with nothing left behind, when the file system refuses (full, read-only, over quota, ...).
    """
    final = directory / name_of(step)
    temporary = directory / f".{final.name}.tmp"
    state_text = json.dumps(_encode(state), allow_nan=False)
    needed = len(state_text) + sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        try:
            _write(temporary, step, tensors, state_text)
            _publish(temporary, final)
        finally:
            _recover(directory)
    except OSError as error:
        raise UserError(
            f"{final}: the checkpoint cannot be saved: {error.strerror or error}; "
            f"it needs about {_readable(needed)}{_free_space(directory)}"
        ) from None
    return final


def load(path: Path, names: Iterable[str] | None = None, device: str = "cpu") -> Checkpoint:
    """Read a checkpoint, all its parts or only those in `names`, onto `device`; what is read is verified first.

    Raises DamagedCheckpoint, or UserError for a part that it does not have or a version that is not read.
    """
    manifest = _verified_manifest(path, names)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"), object_hook=_decode)
        parts = _parts(manifest) if names is None else list(names)
        tensors = {name: load_file(path / f"{name}.safetensors", device=device) for name in parts}
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from None
    return Checkpoint(path, manifest["step"], tensors, state)


def verify(path: Path) -> None:
    """Check the manifest and every file's size and checksum. Raises DamagedCheckpoint for the first that is wrong."""
    _verified_manifest(path, None)


def find_newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `directory`, and a line for each damaged one that was met and set aside.

    A damaged checkpoint is renamed to `damaged_step_XXXXXXXX` and the one before is tried. Only the process that
    trains the run may call this (it also removes what a killed save left); readers use `resolve`.
    """
    notes: list[str] = []
    try:
        _recover(directory)
        for path in reversed(_checkpoints(directory)):
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

    Each is renamed before it is emptied, so that a kill never leaves half of something that looks like a checkpoint.
    Raises UserError when the file system refuses.
    """
    try:
        _recover(directory)
        paths = _checkpoints(directory)
        for path in paths[: max(len(paths) - keep_last, 0)]:
            if step_of(path) != best_step:
                path.rename(directory / f".{path.name}.tmp")
        _recover(directory)
    except OSError as error:
        raise UserError(f"{directory}: an old checkpoint cannot be deleted: {error}") from None


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


def _write(temporary: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state_text: str) -> None:
    temporary.mkdir()
    files: dict[str, Any] = {}
    for name, part in tensors.items():
        path = temporary / f"{name}.safetensors"
        _save_tensors(path, part)
        files[path.name] = _describe(path, sync=True)
    (temporary / STATE).write_text(state_text, encoding="utf-8")
    files[STATE] = _describe(temporary / STATE, sync=True)
    manifest = temporary / MANIFEST
    manifest.write_bytes(_manifest_bytes({"format_version": FORMAT_VERSION, "step": step, "files": files}))
    sync(manifest)
    sync(temporary)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`save_file` with refusals of the file system as OSError, and tensors that share memory written in full."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(separate, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library's files are their owner's alone


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place, durably. Between the two renames of a replacement, `_recover` restores the older one."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)


def _recover(directory: Path) -> None:
    """Put back or remove what an unfinished save left, and finish deletions."""
    for path in directory.glob(".step_*.replaced"):
        original = directory / path.name[1:].removesuffix(".replaced")
        if original.exists():
            _delete(path)
        else:
            path.rename(original)
    for path in directory.glob(".step_*.tmp"):
        _delete(path)


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
        checked = [STATE, *(f"{name}.safetensors" for name in names)]
        for file in checked:
            if file not in files:
                raise UserError(f"{path}: has no {file}; its parts are {', '.join(_parts(manifest))}")
    for file in checked:
        try:
            size = (path / file).stat().st_size
            if size != files[file]["size"]:
                raise DamagedCheckpoint(f"{path}: {file} has {size} bytes, {files[file]['size']} were written")
            if _describe(path / file) != files[file]:
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
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is missing") from None
    except PermissionError as error:
        raise UserError(f"{path}: {MANIFEST} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} cannot be read: {error.strerror}") from None
    try:
        manifest: dict[str, Any] = json.loads(content)
        del manifest["sha256"]
        intact = _manifest_bytes(manifest) == content
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is not what was written: its checksum differs")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: its checkpoint format is {manifest['format_version']}; "
            f"this version of p828 reads format {FORMAT_VERSION}"
        )
    return manifest


def _manifest_bytes(fields: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, checksum included: any other bytes are damage."""
    content = json.dumps(fields, sort_keys=True).encode()
    return json.dumps({**fields, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True, indent=2).encode()


def _describe(path: Path, sync: bool = False) -> dict[str, Any]:
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
    return [file.removesuffix(".safetensors") for file in manifest["files"] if file.endswith(".safetensors")]


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}_{number}")
    return candidate


def _encode(value: Any) -> Any:
    """JSON values with non-finite floats as {NON_FINITE: "nan"}, since JSON has none."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state: key {key!r} is not a string and would come back as one")
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {NON_FINITE: repr(float(value))}
    return value


def _decode(value: dict[str, Any]) -> Any:
    return float(value[NON_FINITE]) if value.keys() == {NON_FINITE} else value


def _free_space(directory: Path) -> str:
    try:
        return f", {_readable(shutil.disk_usage(directory).free)} are free"
    except OSError:
        return ""


def _readable(count: int) -> str:
    exponent = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**exponent:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[exponent]}"
