"""Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch"; devices from Hopper on).

A kernel that is launched so may begin before the one in front of it has ended. The kernels of this folder keep to:

- before `wait_for_earlier_kernels` a program reads only what no kernel writes (weights), or what is written by a kernel
  further back than the one in front;
- after it everything that earlier kernels wrote is visible, and the program may write;
- only then it lets the next kernel begin. So what a kernel wrote is visible to the next but one from its start.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ALLOWED = True


@triton.jit
def wait_for_earlier_kernels(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device, warps: int, stages: int = 1) -> dict[str, Any]:
    """The keyword arguments of a launch; `PDL` is the kernels' own."""
    if device.type != "cuda":
        return {"PDL": False}
    dependent = ALLOWED and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": dependent, "launch_pdl": dependent, "num_warps": warps, "num_stages": stages}
