"""A checkpoint's tensors in safetensors files: whole ones, and fragments of those that ranks share.

The tensors of one part ("model", "optimizer", "random") lie in `PART.safetensors`, or in `PART.rank_0003.safetensors`
and its like, one from each rank. A fragment is stored flat, and the file's metadata says where it belongs.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p828.train.fragments import Fragment

ENDING = ".safetensors"
PLACES = "fragments"  # in the metadata: JSON, name to [start, *shape]


def file_name(part: str, rank: int, size: int) -> str:
    return f"{part}{ENDING}" if size == 1 else f"{part}.rank_{rank:04d}{ENDING}"


def part_of(file: str) -> str | None:
    """The part that a file of a checkpoint belongs to; None for another file."""
    return file.split(".")[0] if file.endswith(ENDING) else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Fragment]) -> None:
    """Write one file; tensors that share memory are written in full. Raises OSError as the file system refuses."""
    separate: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        if isinstance(value, Fragment):
            # Many are views of one tensor, which the library refuses.
            separate[name] = value.values.cpu() if value.values.is_cuda else value.values.clone()
            places[name] = [value.start, *value.shape]
            continue
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(separate, path, metadata={"format": "pt"} | ({PLACES: json.dumps(places)} if places else {}))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library's files are their owner's alone


class _Place(NamedTuple):
    """Where a tensor, or some of it, lies."""

    file: Any
    start: int
    length: int
    is_whole: bool


class Tensors:
    """The tensors of a checkpoint's files, read when asked for. Use in a `with`, which keeps the files open.

    Raises ValueError for metadata that is none, and for a tensor whose fragments do not make it whole.
    """

    def __init__(self, directory: Path, files: Iterable[str], device: str = "cpu") -> None:
        self._stack = ExitStack()
        self._places: dict[tuple[str, str], list[_Place]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        try:
            for file in files:
                part = part_of(file)
                if part is not None:
                    opened = self._stack.enter_context(safe_open(directory / file, "pt", device=device))
                    self._add(part, opened, json.loads((opened.metadata() or {}).get(PLACES, "{}")))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, part: str) -> list[str]:
        return [name for found, name in self._places if found == part]

    def tensor(self, part: str, name: str) -> Tensor:
        """A whole one. Raises KeyError if there is none of this name."""
        places = self._places[part, name]
        if places[0].is_whole:
            return places[0].file.get_tensor(name)
        return self.fragment(part, name, 0, prod(self._shapes[part, name])).view(self._shapes[part, name])

    def fragment(self, part: str, name: str, start: int, count: int) -> Tensor:
        """`count` numbers from place `start` on of the flattened tensor."""
        pieces: list[Tensor] = []
        place_after = start
        for place in self._places[part, name]:
            begin, end = max(start, place.start), min(start + count, place.start + place.length)
            if begin < end:
                if begin != place_after:
                    raise ValueError(f"{name}: its fragments leave a gap or overlap at {min(begin, place_after)}")
                pieces.append(self._piece(place, name, begin - place.start, end - place.start))
                place_after = end
        if place_after != start + count:
            raise ValueError(f"{name}: its fragments end at {place_after}, {start + count} was to be read")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part."""
        return {name: self.tensor(part, name) for name in self.names(part)}

    @staticmethod
    def _piece(place: _Place, name: str, begin: int, end: int) -> Tensor:
        if place.is_whole:
            return place.file.get_tensor(name).flatten()[begin:end]
        return place.file.get_slice(name)[begin:end]

    def _add(self, part: str, file: Any, fragments: Any) -> None:
        if not isinstance(fragments, dict):
            raise ValueError(f"{PLACES} is no table")
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape: Sequence[int] = file.get_slice(name).get_shape()
            start, is_whole = 0, name not in fragments
            count = prod(shape)
            if not is_whole:
                start, *shape = _place(fragments[name], name)
                if start + count > prod(shape):
                    raise ValueError(f"{name}: a fragment reaches past its end")
            known = self._shapes.setdefault((part, name), tuple(shape))
            places = self._places.setdefault((part, name), [])
            if known != tuple(shape) or (places and (is_whole or places[0].is_whole)):
                raise ValueError(f"{name}: is there twice, or with two shapes")
            places.append(_Place(file, start, count, is_whole))
            places.sort(key=lambda place: place.start)


def _place(values: Any, name: str) -> list[int]:
    if not isinstance(values, list) or not values or not all(isinstance(n, int) and n >= 0 for n in values):
        raise ValueError(f"{name}: {values!r} is no place of a fragment")
    return values
