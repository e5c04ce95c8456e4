"""Room for a run: the host's memory, shared memory between processes, and the disk of the run's directory."""

import os
import shutil
from pathlib import Path

from p828.config import Config, with_vocabulary
from p828.data.fractions import short
from p828.doctor.check import Check
from p828.files import shown_bytes
from p828.model.costs import count_parameters
from p828.system.device import LEAST_BYTES
from p828.system.host_memory import free_host_bytes

LITTLE_MEMORY = 4 * 10**9  # bytes of the host: PyTorch with CUDA, the data's buffers and a tokenizer take about half
LITTLE_SHARED = (
    10**9
)  # bytes: NCCL wants tens of megabytes for a GPU; a container has 64 MB unless it is told otherwise
LITTLE_DISK = 10 * 10**9  # bytes, where no configuration says what a run writes
SHARED = Path("/dev/shm")
MASTER_BYTES = 4  # of a parameter in a checkpoint
MOMENT_BYTES = {"float32": 4, "bfloat16": 2}
OFFLOADED_BYTES = 16  # of a parameter whose optimizer is in main memory: master, two moments and gradient


def check_room(config: Config | None, directory: Path, gpus: int) -> list[Check]:
    """Memory and disk. `directory` is the run's, which need not exist; `gpus` of this machine are used."""
    checks = [_memory(config, gpus), _disk(config, directory, gpus)]
    return [*checks, _shared()] if gpus > 1 else checks


def checkpoint_bytes(config: Config, has_gpu: bool) -> int:
    """Of one checkpoint: the float32 masters and AdamW's two moments."""
    parameters = count_parameters(with_vocabulary(config).model).total
    moment = config.optimizer.moment_dtype
    if moment == "auto":
        is_small = has_gpu and config.engine != "deepspeed" and config.train.dtype != "float32"
        moment = "bfloat16" if is_small else "float32"
    return parameters * (MASTER_BYTES + 2 * MOMENT_BYTES[moment])


def existing(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    directory = directory.absolute()
    return next((one for one in (directory, *directory.parents) if os.path.isdir(one)), Path("/"))


def _memory(config: Config | None, gpus: int) -> Check:
    name, free = "memory", free_host_bytes()
    text = f"{shown_bytes(free)} of the host are free"
    wanted = _wanted(config, gpus)
    if config is not None and free < wanted:
        parameters = count_parameters(with_vocabulary(config).model).total
        return Check(
            name, "failure", f"{text}; {short(parameters)} parameters take over {shown_bytes(wanted)} there",
            "take a smaller model, a machine with more memory, or deepspeed without offloading",
        )  # fmt: skip
    if free < LITTLE_MEMORY:
        return Check(name, "warning", text, "end what else runs, or raise the container's limit of memory")
    return Check(name, "ok", text)


def _wanted(config: Config | None, gpus: int) -> int:
    """Bytes of main memory without which the run cannot be: of the model on a CPU, or of what is offloaded."""
    if config is None:
        return 0
    parameters = count_parameters(with_vocabulary(config).model).total
    if config.engine == "deepspeed" and config.deepspeed.offload_optimizer == "cpu":
        return parameters * OFFLOADED_BYTES
    return 0 if gpus and config.train.device != "cpu" else parameters * LEAST_BYTES


def _shared() -> Check:
    """Several GPUs' processes exchange data through it, where the GPUs do not reach each other's memory."""
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError as error:
        return Check("shared memory", "warning", f"{SHARED}: {error.strerror}", "mount a tmpfs there")
    text = f"{shown_bytes(free)} of {SHARED} are free"
    if free < LITTLE_SHARED:
        return Check("shared memory", "warning", text, "start the container with --ipc=host or --shm-size=8g")
    return Check("shared memory", "ok", text)


def _disk(config: Config | None, directory: Path, gpus: int) -> Check:
    """Whether the run's checkpoints have room: all that are kept, the best one, and one that is being written."""
    name = "disk"
    try:
        free = shutil.disk_usage(existing(directory)).free
    except OSError as error:
        return Check(name, "failure", f"{directory}: {error.strerror}", "give another --runs-dir")
    text = f"{shown_bytes(free)} are free for {directory}"
    if config is None and free < LITTLE_DISK:
        return Check(name, "warning", text, "make room: a run keeps several checkpoints of 8 or 12 bytes a parameter")
    if config is None:
        return Check(name, "ok", text)
    one, kept = checkpoint_bytes(config, gpus > 0), config.checkpoint.keep_last + 2
    needs = f"{kept} checkpoints of {shown_bytes(one)}"
    if free < 2 * one:
        return Check(name, "failure", f"{text}; a run writes {needs}", "make room, or give another --runs-dir")
    if free < kept * one:
        return Check(
            name, "warning", f"{text}; a run writes {needs}",
            "make room, lower --checkpoint.keep-last, or give another --runs-dir",
        )  # fmt: skip
    return Check(name, "ok", f"{text}, enough for {needs}")
