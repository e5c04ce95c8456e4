"""Every kernel that a device has, tried out."""

import warnings
from collections.abc import Callable, Iterator

import torch

from p828.doctor.check import Check, worst
from p828.doctor.kernels import decode, layers, update
from p828.doctor.kernels.comparison import REMEDY, Comparison, Place, judged
from p828.model.backend import uses_triton
from p828.system.device import is_out_of_memory, pick_dtype

SelfTest = Callable[[Place], list[Comparison]]
LONGEST_CAUSE = 300  # characters of what a compiler says

EVERYWHERE: dict[str, SelfTest] = {
    "attention": layers.attention,
    "routed experts": layers.routed_experts,
    "loss": update.cross_entropy,
    "embedding": update.embedding,
    "adamw": update.adamw,
    "decode products": decode.products,
    "decode attention": decode.attention,
}
"""Those with code of their own on a CPU, too."""
IN_TRITON: dict[str, SelfTest] = {
    "norm": layers.norm,
    "router": layers.router,
    "shared experts": layers.shared_experts,
    "decode experts": decode.experts,
    "decode tokens": decode.tokens,
}
"""Those that are plain PyTorch on a CPU."""


def check_kernels(device: torch.device) -> Iterator[Check]:
    """Each family of kernels on the device, as it is found: on a GPU they are compiled first, which takes a while."""
    dtype = pick_dtype("auto", device)
    tests = {**EVERYWHERE, **IN_TRITON} if uses_triton(device, dtype) else EVERYWHERE
    for name, test in tests.items():
        yield tried(f"kernel {name}", test, device, dtype)


def check_all_kernels(device: torch.device) -> list[Check]:
    """All families on a further GPU, for which they are compiled already, in one check: the card may be damaged."""
    with torch.cuda.device(device):
        found = list(check_kernels(device))
    wrong = [f"{one.name}: {one.text}" for one in found if one.status != "ok"]
    text = "; ".join(wrong) or f"{len(found)} families as on the first"
    return [Check(f"gpu {device.index} kernels", worst(found), text, REMEDY if wrong else "")]


def tried(name: str, test: SelfTest, device: torch.device, dtype: torch.dtype) -> Check:
    """One self-test. A kernel that does not compile or run is a failure, whatever its error's class."""
    try:
        with warnings.catch_warnings():
            # A thread's first backward pass takes the device up; PyTorch warns of that.
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
            return judged(name, test(Place(device, dtype)))
    except Exception as error:  # of PyTorch, Triton, its compiler or the driver, which have many classes
        if is_out_of_memory(error):
            return Check(name, "warning", "not tried: out of memory", "end what else is using the device")
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name, "failure", f"does not run: {text[:LONGEST_CAUSE]}", REMEDY)
