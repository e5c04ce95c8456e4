"""A checkpoint's tensors in safetensors files: whole tensors, and shards of those that are spread over ranks.

The tensors of one part ("model", "optimizer", "random") lie in `PART.safetensors`, or in `PART.rank_0003.safetensors`
and its like, one file a rank. A shard is stored flat. The file's metadata says where in the whole tensor it belongs.

p828 writes the files itself, piece by piece, so that writing takes next to no memory: a float32 master that is kept in
two halves is joined on the way. The safetensors library reads them.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p828.config.values import shown
from p828.errors import reason
from p828.kernels.adamw import join_float32
from p828.runs.manifest import DamagedCheckpoint

ENDING = ".safetensors"
PLACES = "fragments"  # key of the metadata of shards: JSON, name to [start, *shape of the whole tensor]
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
LONGEST_CAUSE = 300  # characters of a library's message
PIECE = 2**22  # numbers that are joined at a time
WRITTEN_TOGETHER = 2**23  # bytes, so that small tensors do not take a call each
HASHED_BESIDE = 2**18  # bytes; less is hashed sooner than a thread is started
# While training goes on, each copy from a GPU costs the host some 7 ms and each wait some 60 ms, however small it is.
FETCHED_AT_ONCE = 2**25  # numbers of a tensor
FETCHED_TOGETHER = 2**28  # bytes, in pinned memory
ALIGNMENT = 16  # bytes, of each tensor in the pinned memory
MOST_DIMENSIONS, MOST_NUMBERS = 8, 2**48  # of a tensor that is stored in shards


class TensorShard(NamedTuple):
    """One rank's consecutive numbers of a tensor that is spread over ranks."""

    values: Tensor
    """(n,), a view of the memory in which the rank keeps them; bfloat16 if there are `low_bits`."""
    start: int
    """Index of the first of them in the flattened whole tensor."""
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    low_bits: Tensor | None = None
    """int16 (n,), as in a `Master`: the numbers are float32."""


class Master(NamedTuple):
    """A float32 tensor that training keeps as two; `kernels.adamw.join_float32` makes it one."""

    weight: Tensor
    """bfloat16; the layers compute with it."""
    low_bits: Tensor
    """int16, of the same shape."""


class Unread(NamedTuple):
    """A tensor that is elsewhere, and read when it is its turn to be written."""

    like: Tensor
    """On the meta device: shape and dtype."""
    read: Callable[[], Tensor]


Saveable = Tensor | TensorShard | Master | Unread


def tensors_of(value: Saveable) -> tuple[Tensor, ...]:
    """The tensors that a value is made of; of one that is unread only shape and dtype."""
    if isinstance(value, Unread):
        return (value.like,)
    if isinstance(value, TensorShard):
        return (value.values,) if value.low_bits is None else (value.values, value.low_bits)
    return tuple(value) if isinstance(value, Master) else (value,)


def with_tensors(value: Saveable, tensors: tuple[Tensor, ...]) -> Saveable:
    """The same kind of value, made of other tensors."""
    if isinstance(value, TensorShard):
        return TensorShard(tensors[0], value.start, value.shape, *tensors[1:])
    return Master(*tensors) if isinstance(value, Master) else tensors[0]


def file_name(part: str, rank: int, size: int) -> str:
    """The name of the file with one rank's tensors of a part; `size` ranks write one each."""
    return f"{part}{ENDING}" if size == 1 else f"{part}.rank_{rank:04d}{ENDING}"


def part_of(file: str) -> str | None:
    """The part whose tensors a checkpoint's file holds; None for a file without tensors."""
    return file.split(".")[0] if file.endswith(ENDING) else None


def write_tensors(path: Path, tensors: Mapping[str, Saveable]) -> dict[str, Any]:
    """Write a new file, durably. Tensors that share memory are each written in full.

    Returns the file's size and SHA-256 for the manifest, as `manifest.describe` gives them: the sum is of the bytes
    that were to be written, so that a verification finds what the disk made of them. Raises OSError when the file
    system refuses, and TypeError for a dtype that a checkpoint does not have.
    """
    kinds = {name: _kind(value) for name, value in tensors.items()}
    # Wide numbers come first, so that every tensor begins at a multiple of its numbers' size.
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places = {name: [v.start, *v.shape] for name, v in tensors.items() if isinstance(v, TensorShard)}
    if places:
        header["__metadata__"][PLACES] = json.dumps(places)
    end = 0
    for name in names:
        shape = tensors_of(tensors[name])[0].shape
        begin, end = end, end + prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": _code(name, kinds[name]), "shape": list(shape), "data_offsets": [begin, end]}
    spelled = json.dumps(header).encode()
    spelled += b" " * (-len(spelled) % 8)
    beginning = len(spelled).to_bytes(8, "little") + spelled
    digest = hashlib.sha256()
    with path.open("xb", buffering=WRITTEN_TOGETHER) as file:
        _write_hashed(file, memoryview(beginning), digest)
        for piece in _on_host(tensors[name] for name in names):
            _write_hashed(file, piece.view(torch.uint8).numpy().data, digest)
            del piece  # its memory is free before the next tensor is read
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(beginning) + end, "sha256": digest.hexdigest()}


def _write_hashed(file: BinaryIO, data: memoryview, digest: "hashlib._Hash") -> None:
    """Write bytes while a thread adds them to the hash. Both are done on return: the memory may be used again."""
    hashing = threading.Thread(target=digest.update, args=(data,), name="hash")
    try:
        if len(data) < HASHED_BESIDE:
            raise RuntimeError
        hashing.start()
    except RuntimeError:  # also where the system gives this process no more threads
        digest.update(data)
        file.write(data)
        return
    try:
        file.write(data)
    finally:
        hashing.join()


def _kind(value: Saveable) -> torch.dtype:
    """The dtype of its numbers in the file."""
    tensors = tensors_of(value)
    return torch.float32 if len(tensors) > 1 else tensors[0].dtype


def _code(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise TypeError(f"{name}: a checkpoint has no {dtype}")
    return DTYPES[dtype]


def _on_host(values: Iterable[Saveable]) -> Iterator[Tensor]:
    """Their numbers, flat, in pieces on the host; the two halves of a `Master` are joined to float32."""
    buffer: Tensor | None = None
    group: list[tuple[Tensor, ...]] = []
    for large in _pieces(values, FETCHED_AT_ONCE):
        if all(tensor.device.type != "cuda" for tensor in large):  # nothing to fetch, and so none to wait for
            yield from _fetched([*group, large], buffer)
            group = []
            del large
            continue
        if buffer is None:
            buffer = torch.empty(FETCHED_TOGETHER, dtype=torch.uint8, pin_memory=True)
        if sum(map(_room, [*group, large])) > FETCHED_TOGETHER:
            yield from _fetched(group, buffer)
            group = []
        group.append(large)
    yield from _fetched(group, buffer)


def _pieces(values: Iterable[Saveable], count: int) -> Iterator[tuple[Tensor, ...]]:
    """The tensors that make up each value, flat, `count` numbers of each at a time."""
    for value in values:
        yield from _pieces_of(value, count)


def _pieces_of(value: Saveable, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Those of one value, which nothing holds once they are all taken."""
    tensors = (value.read(),) if isinstance(value, Unread) else tensors_of(value)
    split = (tensor.detach().contiguous().view(-1).split(count) for tensor in tensors)
    yield from zip(*split, strict=True)


def _room(piece: Sequence[Tensor]) -> int:
    """Bytes that a piece takes in the buffer."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in piece)


def _fetched(group: Sequence[Sequence[Tensor]], buffer: Tensor | None) -> Iterator[Tensor]:
    """Copy a group of pieces to the buffer, wait once, and yield them; the next group overwrites the buffer."""
    at = 0
    on_host: list[list[Tensor]] = []
    for piece in group:
        tensors = list(piece)
        for number, tensor in enumerate(piece):
            if tensor.device.type == "cuda" and buffer is not None:
                place = buffer[at : at + tensor.nbytes].view(tensor.dtype)
                tensors[number] = place.copy_(tensor, non_blocking=True)
                at += _room([tensor])
        on_host.append(tensors)
    if at:
        torch.cuda.current_stream().synchronize()
    for tensors in on_host:
        for parts in zip(*(tensor.split(PIECE) for tensor in tensors), strict=True):
            yield join_float32(*parts) if len(parts) > 1 else parts[0]


class _Place(NamedTuple):
    """The file that holds a tensor or a shard of it, and which of the flattened tensor's numbers these are."""

    file: Any
    start: int
    length: int
    is_whole: bool


class Kind(NamedTuple):
    """A tensor's dtype and shape, known before it is read."""

    dtype: str
    """In the words of safetensors: "F32" and so on."""
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a checkpoint's files, each read when asked for. Use in a `with`, which keeps the files open.

    Raises DamagedCheckpoint for a file that is no safetensors file, for metadata that says nothing of shards, and for a
    tensor whose shards do not make it whole.
    """

    def __init__(self, directory: Path, files: Iterable[str], device: str = "cpu") -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._places: dict[tuple[str, str], list[_Place]] = {}
        self._kinds: dict[tuple[str, str], Kind] = {}
        try:
            for file in files:
                part = part_of(file)
                if part is not None:
                    with self._reading(file):
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

    def kind(self, part: str, name: str) -> Kind:
        """A tensor's dtype and shape. Raises KeyError if there is no tensor of this name."""
        return self._kinds[part, name]

    def tensor(self, part: str, name: str) -> Tensor:
        """A whole tensor, joined from its shards if need be. Raises KeyError if there is none of this name."""
        places, shape = self._places[part, name], self._kinds[part, name].shape
        if not places[0].is_whole:
            return self.shard(part, name, 0, prod(shape)).view(shape)
        with self._reading(part):
            return places[0].file.get_tensor(name)

    def shard(self, part: str, name: str, start: int, count: int) -> Tensor:
        """(count,): the flattened tensor's numbers from index `start` on, however its shards were cut when saved."""
        with self._reading(part):
            return self._shard(part, name, start, count)

    def _shard(self, part: str, name: str, start: int, count: int) -> Tensor:
        pieces: list[Tensor] = []
        next_start = start
        for place in self._places[part, name]:
            begin, end = max(start, place.start), min(start + count, place.start + place.length)
            if begin < end:
                if begin != next_start:
                    raise ValueError(f"{name}: its shards leave a gap or overlap at {min(begin, next_start)}")
                pieces.append(self._piece(place, name, begin - place.start, end - place.start))
                next_start = end
        if next_start != start + count:
            raise ValueError(f"{name}: its shards end at {next_start}, {start + count} was to be read")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part."""
        return {name: self.tensor(part, name) for name in self.names(part)}

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Raise what the library finds wrong as a DamagedCheckpoint."""
        try:
            yield
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise DamagedCheckpoint(
                f"{self.directory}: {what} cannot be read: {reason(error)[:LONGEST_CAUSE]}"
            ) from None

    @staticmethod
    def _piece(place: _Place, name: str, begin: int, end: int) -> Tensor:
        if place.is_whole:
            return place.file.get_tensor(name).flatten()[begin:end]
        return place.file.get_slice(name)[begin:end]

    def _add(self, part: str, file: Any, places_of_shards: Any) -> None:
        """Note where the file's tensors and shards belong. Raises ValueError."""
        if not isinstance(places_of_shards, dict):
            raise ValueError(f"{PLACES} is no table")
        for name in file.keys():  # noqa: SIM118 (no mapping)
            values = file.get_slice(name)
            shape: Sequence[int] = values.get_shape()
            start, is_whole = 0, name not in places_of_shards
            count = prod(shape)
            if not is_whole:
                start, *shape = _place(places_of_shards[name], name)
                if start + count > prod(shape):
                    raise ValueError(f"{name}: a shard reaches past its end")
            kind = Kind(values.get_dtype(), tuple(shape))
            known = self._kinds.setdefault((part, name), kind)
            places = self._places.setdefault((part, name), [])
            if known != kind or (places and (is_whole or places[0].is_whole)):
                raise ValueError(f"{name}: is there twice, or with two shapes or dtypes")
            places.append(_Place(file, start, count, is_whole))
            places.sort(key=lambda place: place.start)


def _place(values: Any, name: str) -> list[int]:
    is_place = (
        isinstance(values, list)
        and 1 <= len(values) <= 1 + MOST_DIMENSIONS
        and all(type(number) is int and 0 <= number <= MOST_NUMBERS for number in values)
    )
    if not is_place:
        raise ValueError(f"{name}: {shown(values)} is no place of a shard")
    return values
