"""Where the threads of a process are, for the report on a hang."""

import json
import sys
import threading
import traceback
from pathlib import Path

import torch

LAST_OPERATIONS = 5


def stacks() -> str:
    """The stack of every thread of this process, innermost frames first, the main thread last.

    Followed by the last collective operations that PyTorch's flight recorder saw. Writes no file, so that a full disk
    does not matter.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] == main):
        frames = reversed(traceback.extract_stack(frame))
        lines = (f'  File "{found.filename}", line {found.lineno} in {found.name}' for found in frames)
        parts.append("\n".join((f"Thread 0x{ident:016x} ({names.get(ident, 'not of Python')}):", *lines)))
    return "\n\n".join(parts) + _operations()


def _operations() -> str:
    """The last collective operations on the GPU, one a line."""
    if not torch.distributed.is_nccl_available() or not torch.cuda.is_initialized():
        return ""
    from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

    entries = json.loads(_dump_nccl_trace_json()).get("entries", [])[-LAST_OPERATIONS:]
    keys = ("profiling_name", "state", "input_sizes", "time_discovered_completed_ns")
    return "".join(f"\n  {' '.join(f'{key}={entry.get(key)}' for key in keys)}" for entry in entries)


def main_thread(stack: str) -> str:
    """The innermost three frames of the main thread in what `stacks` returned, in a line."""
    frames = [line.strip() for line in stack.rpartition("Thread 0x")[2].splitlines() if "File" in line]
    return " < ".join(
        f"{Path(frame.split(chr(34))[1]).name}{frame.rpartition(chr(34))[2].replace(', line ', ':')}"
        for frame in frames[:3]
    )
