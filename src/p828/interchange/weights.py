"""Weights in safetensors files as the hub has them: read from a checkpoint and written, a tensor at a time.

`model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.files import write_atomic
from p828.interchange.architectures.architecture import Piece, Place
from p828.kernels.adamw import split_float32
from p828.model.precision import is_matrix
from p828.runs.tensors import DTYPES, Tensors

LARGEST_FILE = 5 * 10**9  # bytes, as the hub recommends; only a larger tensor has a larger file
FILE_NAMES = "model{suffix}.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WrittenTensor(NamedTuple):
    """A tensor of an exported file, and where its numbers come from."""

    name: str
    source: str
    """Our tensor's name."""
    place: Place
    """In our tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


def written_tensors(
    pieces: Callable[[str, ModelConfig], list[Piece]], config: ModelConfig, tensors: Tensors, dtype: torch.dtype
) -> list[WrittenTensor]:
    """What a model's files hold, in the order of our tensors; nothing is read.

    In bfloat16 are the matrices that training computes with in bfloat16. Router, balance bias, norms and sinks stay
    float32.
    """
    found = []
    for source in tensors.names("model"):
        whole = torch.empty(tensors.kind("model", source).shape, device="meta")
        stored = dtype if is_matrix(source, whole.ndim) else torch.float32
        for name, place in pieces(source, config):
            found.append(WrittenTensor(name, source, place, tuple(whole[place].shape), stored))
    return found


def write_weights(
    directory: Path,
    written: Sequence[WrittenTensor],
    tensors: Tensors,
    report: Callable[[str], None],
    largest_file: int = LARGEST_FILE,
) -> list[Path]:
    """Write all files, durably, and return their paths. In memory is one of our tensors at a time.

    `report` gets a line for each of several files. Raises OSError, and DamagedCheckpoint for what cannot be read.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in written}
    files = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern=FILE_NAMES,
        max_shard_size=largest_file,
    )
    reader = WeightsReader(tensors)
    for file, names in files.filename_to_tensors.items():
        if files.is_sharded:
            report(f"writing {file}")
        _write_file(directory / file, [by_name[name] for name in names], reader.read)
    if files.is_sharded:
        metadata = {"total_parameters": sum(t.numbers for t in written), "total_size": sum(t.bytes for t in written)}
        index = {"metadata": metadata, "weight_map": files.tensor_to_filename}
        write_atomic(directory / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [directory / file for file in files.filename_to_tensors]


class WeightsReader:
    """Reads pieces of our tensors, and keeps the tensor of the last piece: the next one is mostly of the same."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._source, self._whole = "", torch.empty(0)

    def read(self, piece: WrittenTensor) -> Tensor:
        """In the piece's dtype; bfloat16 rounds as training does (`kernels.adamw.split_float32`)."""
        if piece.source != self._source:
            self._whole = torch.empty(0)  # the last one's memory is free before the next one takes its own
            self._whole, self._source = self._tensors.tensor("model", piece.source), piece.source
        values = self._whole[piece.place].contiguous()
        return split_float32(values)[0] if piece.dtype == torch.bfloat16 else values


def _write_file(path: Path, tensors: Sequence[WrittenTensor], read: Callable[[WrittenTensor], Tensor]) -> None:
    # float32 comes first, so that every tensor begins at a multiple of its numbers' size
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    spelled = json.dumps(header).encode()
    spelled += b" " * (-len(spelled) % 8)
    with path.open("xb") as file:
        file.write(len(spelled).to_bytes(8, "little") + spelled)
        for tensor in ordered:
            file.write(read(tensor).flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
