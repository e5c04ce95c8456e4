"""Which of a run's processes this is, as a launcher says in the environment. Imports no torch."""

import os
from typing import NamedTuple

# What torchrun, DeepSpeed's launcher and a start by hand all set, since PyTorch cannot join the processes without.
ALL_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Process(NamedTuple):
    """One of `size` processes that train one run; by itself, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    is_launched: bool = False


def launched() -> Process:
    """This process's place among those that a launcher started.

    A launcher is at work where `ALL_SET` are. Fewer of them, as a RANK that some other program left behind or what
    srun sets, say nothing: the process is alone. So it is where they are no whole numbers, or no place among
    so many.
    """
    if not all(name in os.environ for name in ALL_SET):
        return Process()
    numbers = [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")]
    if not all(number.isdecimal() for number in numbers):
        return Process()
    rank, size, local_rank = map(int, numbers)
    if rank >= size:
        return Process()
    return Process(rank, size, local_rank, is_launched=True)
