"""Files of tensors: their sum for the manifest, and tensors put together from shards."""

import hashlib
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from p828.kernels.adamw import split_float32
from p828.runs.tensors import HASHED_BESIDE, Master, Tensors, TensorShard, Unread, write_tensors


def test_the_sum_is_that_of_the_file_whatever_is_in_it(tmp_path: Path) -> None:
    large = torch.randn(3, HASHED_BESIDE // 4)  # is hashed by a thread, others are not
    master = torch.randn(2 * HASHED_BESIDE)
    tensors = {
        "large": large.T,
        "small": torch.tensor(1.5),
        "master": Master(*split_float32(master)),
        "shard": TensorShard(large.flatten()[:100], 7, (20, 10)),
        "none": torch.zeros(0, 4),
    }
    found = write_tensors(tmp_path / "model.safetensors", tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert found == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["large"], large.T)
    assert torch.equal(read["master"], master)


@pytest.mark.parametrize("ends", [[12], [5, 12], [0, 1, 12], [4, 8, 12]])
def test_any_shard_is_read_from_any_others(tmp_path: Path, ends: list[int]) -> None:
    whole = torch.arange(12.0).view(3, 4)
    begins = [0, *ends[:-1]]
    for rank, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        shard = TensorShard(whole.flatten()[begin:end], begin, (3, 4))
        write_tensors(tmp_path / f"model.rank_{rank:04}.safetensors", {"a": shard})
    with Tensors(tmp_path, sorted(path.name for path in tmp_path.iterdir())) as tensors:
        assert torch.equal(tensors.tensor("model", "a"), whole)
        for start in range(13):
            for count in range(1, 13 - start):
                assert torch.equal(tensors.shard("model", "a", start, count), whole.flatten()[start : start + count])


def test_one_unread_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """Each is freed before the next one is read."""
    held: list[weakref.ref[Any]] = []

    def read(number: int) -> torch.Tensor:
        assert not any(reference() is not None for reference in held)
        numbers = np.full(1000, number, np.float32)
        held.append(weakref.ref(numbers))
        return torch.from_numpy(numbers)

    like = torch.empty(1000, device="meta")
    tensors = {str(number): Unread(like, partial(read, number)) for number in range(3)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert len(held) == 3
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[str(number)], torch.full((1000,), float(number))) for number in range(3))
