"""This process's rank, as a launcher gives it in the environment. Imports no torch."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from p828.errors import ConfigError, warn

# torchrun, DeepSpeed's launcher and a start by hand all set these; PyTorch cannot join the processes without them.
ALL_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = "unset RANK to train on one device"
HIGHEST_PORT = 2**16 - 1
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # 1: rank 0 has a store for the ranks' addresses, not torchrun


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


def check_launch() -> None:
    """Raises ConfigError where all of `ALL_SET` are set, but to what no launcher sets: `launched` takes no notice."""
    if not all(name in os.environ for name in ALL_SET):
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not value.isdecimal() or (name == "MASTER_PORT" and int(value) > HIGHEST_PORT):
            accepted = f"a port up to {HIGHEST_PORT}" if name == "MASTER_PORT" else "a number"
            raise ConfigError(f"{name} = {value} in the environment: {accepted} is accepted; {ALONE}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise ConfigError(f"RANK = {rank} in the environment: less than WORLD_SIZE = {size} is accepted; {ALONE}")


def _local_size() -> int:
    """As torchrun or DeepSpeed's launcher names it."""
    number = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "")
    return int(number) if number.isdecimal() else 0


def after_restart() -> str:
    """What to do where ranks that torchrun has started again cannot join each other; empty for a first start.

    They may find the addresses of the processes before them in torchrun's store.
    """
    is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not is_again or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return (
        f"\ntorchrun's store may hold addresses of before the restart; with {OWN_STORE}=1, torchrun --standalone (or "
        "--rdzv-backend c10d) makes a new one"
    )


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
