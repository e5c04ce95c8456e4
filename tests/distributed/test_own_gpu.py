"""Which GPU a rank takes, and what is refused, told from what the processes see."""

import pytest

from p828.distributed.own_gpu import Gpu, check_own_gpus, gpu_index
from p828.errors import ConfigError, LocalRankError

FIRST, SECOND = ("first", "boot-1"), ("second", "boot-2")


@pytest.mark.parametrize(
    "local_rank, visible, index",
    [
        *((rank, 8, rank) for rank in range(8)),  # torchrun: every process sees the host's GPUs
        *((rank, 1, 0) for rank in range(8)),  # srun --gpus-per-task=1: each sees its own
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(local_rank: int, visible: int, index: int) -> None:
    assert gpu_index(local_rank, visible) == index


@pytest.mark.parametrize("local_rank, visible", [(2, 2), (7, 4)])
def test_fewer_gpus_than_ranks_are_refused(local_rank: int, visible: int) -> None:
    with pytest.raises(LocalRankError, match=rf"LOCAL_RANK = {local_rank}: .* shows {visible} GPUs to PyTorch"):
        gpu_index(local_rank, visible)


def test_ranks_with_gpus_of_their_own_are_accepted() -> None:
    check_own_gpus([Gpu(FIRST, "a"), Gpu(FIRST, "b"), Gpu(SECOND, "c"), Gpu(SECOND, "d")])
    # Two virtual machines may be given parts of one GPU; NCCL, too, counts as the same what is so on one host.
    check_own_gpus([Gpu(FIRST, "a"), Gpu(SECOND, "a")])
    check_own_gpus([None, None])  # on CPUs


def test_two_ranks_with_one_gpu_are_refused() -> None:
    """As two processes of a host with one GPU have it, whatever the other host has."""
    gpus = [Gpu(FIRST, "a"), Gpu(SECOND, "b"), Gpu(SECOND, "c"), Gpu(SECOND, "b")]
    expected = "ranks 1 and 3 have the same GPU of second, GPU-b: 3 processes were started there"
    with pytest.raises(ConfigError, match=expected):
        check_own_gpus(gpus)
