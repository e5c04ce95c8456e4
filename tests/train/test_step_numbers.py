"""What a step's record says of data and machine."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p828.cli.main import dispatch
from p828.data.batch import Sample
from p828.data.loader import Loader, make_batch
from p828.runs import records
from p828.runs.train_state import BatchStats
from p828.system.device import compiled_graphs
from p828.train.fetch import rows_in_twice
from runs import write_toml


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in records.read(run / "metrics.jsonl") if line["kind"] == "step"]


def test_rows_of_one_epoch_that_are_twice_in_a_step_are_counted() -> None:
    first, second = (
        [Sample(np.full(9, token), np.zeros(9, np.int32)) for token in tokens] for tokens in ([1, 2], [2, 3])
    )
    later = [dataclasses.replace(sample, epoch=1) for sample in first]
    stats = BatchStats.of([make_batch(rows, True) for rows in (first, second, later)], 1)
    assert (stats.rows, stats.repeated_rows) == (6, 1)


@pytest.mark.parametrize("keys, twice", [([5, 6, 7], 1), ([5, 6, 5], 5), ([5, 5, 5], 9)])
def test_ranks_that_have_the_same_rows(keys: list[int], twice: int) -> None:
    """Of four rows on each rank; the first one has a row twice by itself."""
    assert rows_in_twice(keys, [4, 4, 4], [1, 0, 0]) == twice


def test_a_step_says_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, take = [], Loader.__next__

    def noted(loader: Loader) -> Any:
        batch = take(loader)
        largest.append(int(torch.maximum(batch.tokens_BS.max(), batch.targets_BS.max())))
        return batch

    monkeypatch.setattr(Loader, "__next__", noted)
    toml = write_toml(tmp_path, train={"steps": 3}, evaluation={"every": 0})
    assert dispatch(["train", str(toml), "--runs-dir", str(tmp_path / "runs")]) == 0
    lines = steps_of(tmp_path / "runs" / "tiny")
    assert [line["max_token"] for line in lines] == [max(largest[step : step + 2]) for step in (0, 2, 4)]
    assert [line["targets"] for line in lines] == [2 * 2 * 32] * 3
    assert all(0 < line["data_seconds"] < line["seconds"] for line in lines)
    free = shutil.disk_usage(tmp_path).free
    assert lines[0]["disk_free_bytes"] == pytest.approx(free, rel=0.05)  # others write meanwhile
    assert not any("rank_memory_bytes" in line or "compilations" in line for line in lines)


def test_graphs_that_are_compiled_are_counted() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compiled = torch.compile(double, backend="eager", dynamic=False)
    counts = [compiled_graphs()]
    for length in (3, 3, 4):
        compiled(torch.ones(length))
        counts.append(compiled_graphs())
    assert [after - before for before, after in itertools.pairwise(counts)] == [1, 0, 1]
