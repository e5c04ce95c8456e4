"""What a run records when it starts: by which command, which code, and on which machine."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from p828.system.device import gpu_name

OURS = ("p828", "p828.exe")  # of a program's path, the last name, or that of the package whose __main__.py it is


def start_record(device: torch.device, num_ranks: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """The command as it was typed, where it was typed, versions with the commit, and the machine of rank 0."""
    return {
        "command": command_line(),
        "directory": os.getcwd(),
        "versions": dict(versions),
        "device": device_text(device, num_ranks),
        "machine": f"{platform.node()}: {platform.platform()}, {os.cpu_count()} CPU cores",
    }


def command_line() -> str:
    """This process's command, quoted for a shell: `p828 train ...`, or that of the Python program that trains."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    is_own = (path.parent if path.name == "__main__.py" else path).name in OURS
    return shlex.join(["p828", *arguments] if is_own else [Path(sys.executable).name, program, *arguments])


def device_text(device: torch.device, num_ranks: int) -> str:
    """`cpu`, `cuda:0 (NVIDIA H100 80GB HBM3)` or, on several ranks, `2 x cuda (NVIDIA H100 80GB HBM3)`."""
    name = gpu_name(device)
    return (str(device) if num_ranks == 1 else f"{num_ranks} x {device.type}") + (f" ({name})" if name else "")
