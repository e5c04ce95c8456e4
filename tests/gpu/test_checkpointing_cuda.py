"""Checkpoints of what is on a GPU, written beside its work."""

from pathlib import Path

import pytest
import torch

from p828.distributed.group import ProcessGroup
from p828.runs import checkpoint, file_names
from p828.runs.tensors import TensorShard
from p828.train.checkpointing import AsyncCheckpointer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_what_is_written_is_what_the_device_had_computed_at_the_start(cuda: torch.device, tmp_path: Path) -> None:
    saver = AsyncCheckpointer(tmp_path, ProcessGroup(), cuda)
    weights, matrix = torch.zeros(64 * 2**20, device=cuda), torch.randn(8192, 8192, device=cuda)
    for step in (1, 2):  # the second time into the copies of the first
        for _ in range(10):
            matrix @ matrix  # keeps the device busy, so that the host is ahead of it
        weights += 1
        saver.start(step, {"model": {"a": weights, "b": TensorShard(weights[:1000], 0, (10, 100))}}, {})
        for _ in range(10):
            matrix @ matrix
            weights += 0.25
        weights.copy_(torch.full_like(weights, step))
        saved = saver.finish()
        loaded = checkpoint.load(tmp_path / file_names.name_of(step)).tensors["model"]
        assert torch.equal(loaded["a"], torch.full((64 * 2**20,), float(step)))
        assert torch.equal(loaded["b"], torch.full((10, 100), float(step)))
        assert saved.copy_bytes == 4 * (64 * 2**20 + 1000)


def test_a_gpu_without_room_makes_training_wait(cuda: torch.device, tmp_path: Path) -> None:
    saver = AsyncCheckpointer(tmp_path, ProcessGroup(), cuda)
    weights = torch.ones(2**20, device=cuda)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(cuda)[0]
    filling = torch.empty(free - 2**29, dtype=torch.uint8, device=cuda)
    saver.start(1, {"model": {"a": weights}}, {})
    assert saver.is_written
    assert saver.finish().copy_bytes == 0
    del filling
    torch.cuda.empty_cache()
    saver.start(2, {"model": {"a": weights}}, {})
    assert saver.finish().copy_bytes == 2**22
