"""Which device and arithmetic a run gets, its memory, and its random states."""

import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from p828.config import TrainConfig
from p828.errors import ConfigError, RunFailed
from p828.system.host_memory import free_host_bytes

LEAST_BYTES = 8  # of a parameter that is trained: its master and its gradient; moments come on top
NO_HOST_MEMORY = "can't allocate memory"
LONGEST_CAUSE = 200  # characters of what PyTorch says
LESS_TRAINING_MEMORY = (
    "Lower train.micro_batch_size and raise train.gradient_accumulation as much, or set train.gradient_checkpointing"
)


def pick_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises ConfigError when a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda": this machine shows no GPU to PyTorch; "auto" or "cpu" is accepted')
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The layers' arithmetic: on a CPU without matrix units bfloat16 is many times slower than float32.

    Raises ConfigError when bfloat16 is asked for and the GPU lacks it; `auto` takes float32 there.
    """
    if wanted == "bfloat16" and lacks_bfloat16(device):
        raise ConfigError(
            f'train.dtype = "bfloat16": {torch.cuda.get_device_name(device)} does not compute in it; '
            '"auto" or "float32" is accepted'
        )
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and not lacks_bfloat16(device) else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def gpu_name(device: torch.device) -> str:
    """What the driver calls a GPU, as "NVIDIA H100 80GB HBM3"; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU without matrix units for bfloat16: those before compute capability 8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8


def compiles(train: TrainConfig, device: torch.device) -> bool:
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # which is imported by the first use of torch.compile
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def make_deterministic() -> None:
    """Only algorithms that repeat bit for bit; operations without one raise."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS wants for repeatable sums
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what was not written; filling every new tensor with NaN to show that would take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_room(parameters: int, device: torch.device) -> None:
    """Raises ConfigError for a model that cannot be trained in the device's free memory, before any is taken."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    if parameters * LEAST_BYTES > free:
        raise ConfigError(
            f"a model of {parameters:,} parameters takes more than {parameters * LEAST_BYTES / 1e9:,.0f} GB to train; "
            f"{free / 1e9:,.1f} GB are free on this {'GPU' if device.type == 'cuda' else 'machine'}"
        )


@contextmanager
def explain_out_of_memory(what: str, remedy: str = LESS_TRAINING_MEMORY) -> Iterator[None]:
    """Where the block takes more memory than there is, raise RunFailed with what to change.

    PyTorch has an error of its own for a GPU, and a RuntimeError for the host.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        cause = text[max(text.find(NO_HOST_MEMORY), 0) :][:LONGEST_CAUSE] or "of the host"
        raise RunFailed(f"{what}: out of memory: {cause}\n{remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device or the host has no more memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_HOST_MEMORY in " ".join(str(error).split())


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the generators that dropout draws from, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def machine() -> tuple[str, str]:
    """The host's name and, on Linux, the id of its start, in which two hosts of one name differ."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return socket.gethostname(), boot
