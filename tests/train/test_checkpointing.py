"""Checkpoints that are written beside the training, on one process."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.distributed.group import ProcessGroup
from p828.errors import RunFailed
from p828.runs import checkpoint, file_names
from p828.runs.tensors import TensorShard
from p828.train import checkpointing as background_saver
from p828.train.checkpointing import AsyncCheckpointer

CPU = torch.device("cpu")


@pytest.fixture
def saver(tmp_path: Path) -> AsyncCheckpointer:
    return AsyncCheckpointer(tmp_path, ProcessGroup(), CPU)


def parts(value: float) -> dict[str, dict[str, torch.Tensor | TensorShard]]:
    flat = torch.full((300_000,), value)
    return {"model": {"a": torch.full((500, 600), value).t(), "b": TensorShard(flat[:100_000], 0, (100, 1000))}}


def test_what_is_written_is_what_was_there_at_the_start(saver: AsyncCheckpointer, tmp_path: Path) -> None:
    tensors = parts(1.0)
    for step in (1, 2):  # the second time into the copies of the first
        saver.start(step, tensors, {"step": step})
        expected = float(step)
        for value in tensors["model"].values():
            (value.values if isinstance(value, TensorShard) else value).add_(1.0)
        saved = saver.finish()
        loaded = checkpoint.load(tmp_path / file_names.name_of(step))
        assert loaded.state == {"step": step}
        assert torch.equal(loaded.tensors["model"]["a"], torch.full((600, 500), expected))
        assert torch.equal(loaded.tensors["model"]["b"], torch.full((100, 1000), expected))
        assert saved.copy_bytes == 4 * (300_000 + 100_000)
        assert saved.waited > 0


def test_without_room_for_a_copy_training_waits(saver: AsyncCheckpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_saver, "SPARE_BYTES", 2**60)
    saver.start(1, parts(1.0), {})
    assert saver.is_written
    saved = saver.finish()
    assert saved.copy_bytes == 0
    assert saved.waited >= saved.seconds
    checkpoint.verify(saver.directory / file_names.name_of(1))


@dataclass
class RemovesTheDirectory(ProcessGroup):
    """Does so whenever the ranks tell each other something, as what they have written."""

    directory: Path = Path()

    def all_gather_object(self, value: Any) -> list[Any]:
        shutil.rmtree(self.directory, ignore_errors=True)
        return super().all_gather_object(value)


def test_a_file_system_that_refuses_is_reported_at_the_end(saver: AsyncCheckpointer, tmp_path: Path) -> None:
    saver.start(1, parts(1.0), {})
    saver.finish()
    saver.directory, saver.ranks = tmp_path / "gone", RemovesTheDirectory(directory=tmp_path / "gone")
    saver.start(2, {}, {})
    with pytest.raises(RunFailed, match="cannot be saved: No such file"):
        saver.finish()
    assert saver.step is None
    checkpoint.verify(tmp_path / file_names.name_of(1))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_an_error_of_ours_in_the_thread_is_raised_and_nothing_published(
    saver: AsyncCheckpointer, tmp_path: Path
) -> None:
    saver.start(1, {"model": {"a": torch.zeros(3, dtype=torch.complex32)}}, {})  # which no file format here has
    with pytest.raises(Exception, match="complex32"):
        saver.finish()
    assert checkpoint.find_newest(tmp_path) == (None, [])


def test_old_ones_are_deleted_beside_the_training(saver: AsyncCheckpointer, tmp_path: Path) -> None:
    for step in range(1, 6):
        saver.start(step, parts(step), {})
        saver.finish()
        saver.delete_old(keep_last=2, best_step=1)
    saver.wait_for_deletion()
    assert sorted(path.name for path in tmp_path.iterdir()) == [file_names.name_of(step) for step in (1, 4, 5)]
    assert saver.problem == ""
