"""GPUs and their driver: whether PyTorch sees them, has code for them, and what others leave of their memory."""

import os

import torch

from p828.config import Config, with_vocabulary
from p828.data.fractions import short
from p828.distributed.links import nvidia_smi
from p828.doctor.check import Check
from p828.files import shown_bytes
from p828.model.costs import count_parameters
from p828.plan.peak import peak
from p828.plan.setup import configured_stage, plain_setup, setup_of
from p828.system.device import lacks_bfloat16

LARGE_ON_A_CPU = 10**7  # parameters: a CPU of 8 cores trains on a few thousand tokens a second then
SURELY_FITS = 0.9  # of the free memory: plans are within a tenth of what was measured (docs/plan.md)
A_PART = 0.05  # of a GPU's memory: what is taken above it is another process's, not the driver's


def check_gpus(config: Config | None) -> list[Check]:
    """The driver, each GPU with its compute capability and free memory; of a machine without any, one check."""
    if not torch.cuda.is_available():
        return [_without(config)]
    checks = [_driver()]
    for number in range(torch.cuda.device_count()):
        checks += [_capability(number), _memory(number, config, torch.cuda.device_count())]
    return checks


def _without(config: Config | None) -> Check:
    """Why there is no GPU: there is none, or PyTorch does not see one that nvidia-smi sees."""
    cards = [line.strip() for line in nvidia_smi("--query-gpu=name", "--format=csv,noheader").splitlines()]
    if cards:
        text = f"nvidia-smi sees {', '.join(cards)}, PyTorch none"
        return Check("gpu", "failure", text, _why_unseen())
    if config is not None and config.train.device == "cuda":
        return Check("gpu", "failure", 'none, and train.device = "cuda"', 'give train.device "auto" or "cpu"')
    if config is not None:
        parameters = count_parameters(with_vocabulary(config).model).total
        text = f"none: {short(parameters)} parameters train on the CPU"
        if parameters > LARGE_ON_A_CPU:
            return Check("gpu", "warning", f"{text}, which takes days", "use a machine with an NVIDIA GPU")
        return Check("gpu", "ok", text)
    return Check("gpu", "ok", "none: p828 computes on the CPU, which is enough for the quickstart")


def _why_unseen() -> str:
    if not torch.version.cuda:
        return "this PyTorch is built for CPUs only: install the one for CUDA (https://pytorch.org)"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        shown = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={shown!r} may hide it: unset it, or give the numbers of GPUs"
    driver = _driver_version() or "of unknown version"
    return f"the driver {driver} may be too old for CUDA {torch.version.cuda}: update it, or install an older PyTorch"


def _driver_version() -> str:
    return next(iter(nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()), "").strip()


def _driver() -> Check:
    version = _driver_version()
    shown = f"{version}, with CUDA {torch.version.cuda} in PyTorch" if version else "nvidia-smi does not tell"
    if not version:
        return Check("driver", "warning", shown, "have nvidia-smi on the PATH: p828 reads the GPUs' links by it")
    return Check("driver", "ok", shown)


def _capability(number: int) -> Check:
    """Whether this PyTorch has code for the GPU, and the GPU has matrix units for bfloat16."""
    device, name = torch.device("cuda", number), torch.cuda.get_device_name(number)
    major, minor = torch.cuda.get_device_capability(number)
    text = f"{name}, compute capability {major}.{minor}"
    known = torch.cuda.get_arch_list()
    if known and not any(_runs_on(arch, major, minor) for arch in known):
        return Check(f"gpu {number}", "failure", f"{text}: PyTorch has no code for it", f"it has {', '.join(known)}")
    if lacks_bfloat16(device):
        return Check(
            f"gpu {number}", "warning", f"{text}: no matrix units for bfloat16, so runs compute in float32",
            "use a GPU of compute capability 8.0 or later; p828's kernels need bfloat16",
        )  # fmt: skip
    return Check(f"gpu {number}", "ok", f"{text}, computes in bfloat16")


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch`, as sm_90 or compute_90, runs: that of its generation, and what can be compiled later."""
    kind, _, digits = arch.partition("_")
    digits = digits.rstrip("af")
    if not digits.isdigit():
        return False
    own_major, own_minor = int(digits[:-1]), int(digits[-1])
    if kind == "compute":
        return (own_major, own_minor) <= (major, minor)
    return own_major == major and own_minor <= minor


def _memory(number: int, config: Config | None, gpus: int) -> Check:
    free, total = torch.cuda.mem_get_info(number)
    return judged_memory(number, free, total, total - free - torch.cuda.memory_reserved(number), config, gpus)


def judged_memory(number: int, free: int, total: int, taken: int, config: Config | None, gpus: int) -> Check:
    """What is free of a GPU beside what the run is planned to take, and what others have `taken`. All in bytes."""
    name, text = f"gpu {number} memory", f"{shown_bytes(free)} of {shown_bytes(total)} are free"
    planned = None if config is None else planned_bytes(config, gpus)
    if planned is not None:
        text += f"; the run takes about {shown_bytes(planned)}"
    if planned is not None and planned > free:
        return Check(
            name, "failure", text,
            "p828 plan CONFIG says which micro-batch fits; or give --train.gradient-checkpointing, or several GPUs",
        )  # fmt: skip
    if planned is not None and planned > SURELY_FITS * free:
        return Check(
            name, "warning", f"{text}, which may not fit", "lower --train.micro-batch-size; see p828 plan CONFIG"
        )
    if taken > A_PART * total:
        remedy = "nvidia-smi names the processes that have it (outside a container); end them, or take another GPU"
        return Check(name, "warning", f"{text}; {shown_bytes(taken)} are taken already", remedy)
    return Check(name, "ok", text)


def planned_bytes(config: Config, gpus: int) -> int | None:
    """What a run takes on each GPU when most is taken; None of a run that is not planned: in float32.

    Raises ConfigError for a DeepSpeed file that is not accepted.
    """
    if config.train.dtype == "float32":
        return None
    stage = configured_stage(config, gpus)
    setup = plain_setup(config) if stage is None else setup_of(config, stage, gpus)
    return peak(with_vocabulary(config), setup, config.train.micro_batch_size).total
