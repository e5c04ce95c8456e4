"""This process's rank, as a launcher gives it in the environment. Imports no torch."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from p828.errors import warn

# torchrun, DeepSpeed's launcher and a start by hand all set these; PyTorch cannot join the processes without them.
ALL_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Process(NamedTuple):
    """A rank among the `size` processes that train one run; without a launcher, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among the processes of its machine."""
    is_launched: bool = False
    local_size: int = 1
    """The processes of its machine; 0 where the launcher does not say."""


def launched() -> Process:
    """This process's place among those that a launcher started.

    A launcher started it if all of `ALL_SET` are set. The process is alone if some are missing (a RANK that another
    program left behind, or srun's variables), if they are no whole numbers, or if RANK is not below WORLD_SIZE.
    """
    if not all(name in os.environ for name in ALL_SET):
        return Process()
    numbers = [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")]
    if not all(number.isdecimal() for number in numbers):
        return Process()
    rank, size, local_rank = map(int, numbers)
    if rank >= size:
        return Process()
    return Process(rank, size, local_rank, is_launched=True, local_size=_local_size())


def _local_size() -> int:
    """As torchrun or DeepSpeed's launcher names it."""
    number = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "")
    return int(number) if number.isdecimal() else 0


def tell_launcher(text: str) -> None:
    """Give torchrun the text of the error that this process ends with, for the report that torchrun ends with.

    torchrun prints a traceback of its own whenever a rank fails. Its last lines then have the text, in place of advice
    on how to get a traceback. Other launchers name no file for it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the text is printed as well
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def report_once(lines: Iterable[str]) -> None:
    """Warn of each; of several processes that train one run, the first does."""
    if launched().rank == 0:
        for line in lines:
            warn(line)
