"""What DeepSpeed reads as the number of a process's GPU."""

import os

import pytest
import torch

from p828.engine.deepspeed.local_rank import local_rank_of


@pytest.mark.parametrize("device, read", [("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")])
def test_deepspeed_reads_the_gpu_s_number_and_others_the_rank(
    monkeypatch: pytest.MonkeyPatch, device: str, read: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    with local_rank_of(torch.device(device)):
        assert os.environ["LOCAL_RANK"] == read
        assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    assert os.environ["LOCAL_RANK"] == "3"


def test_mpirun_s_own_variable_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    with local_rank_of(torch.device("cuda:0")):
        assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == os.environ["LOCAL_RANK"] == "0"
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "3"
