"""How much memory of the host this process may still take."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_host_bytes(processes: int = 1, root: Path = Path("/")) -> int:
    """The least of what the machine, the container and the process's own limits leave.

    What machine and container leave is shared with the other `processes` on this host that want as much. `root` is
    where `proc` and `sys` are.
    """
    shared = min([psutil.virtual_memory().available, *_left_by_groups(root)])
    return max(min([shared // processes, *_left_by_limits()]), 0)


def _left_by_limits() -> Iterator[int]:
    used = psutil.Process().memory_info()
    for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - taken


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves, of either version; a container is one of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or none are used
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A group may take what all those above it leave. In a container the top is its own, whatever its name is.
        group = top.joinpath(*(part for part in name.split("/") if part not in ("", "..")))
        for directory in (group, *group.parents):
            if directory.is_relative_to(top):
                yield from _left_by(directory, *files)


def _left_by(group: Path, most: str, taken: str, reclaimable: str) -> Iterator[int]:
    """Nothing if it has no limit. Pages of files that the system gives up first are not counted as taken."""
    try:
        limit = (group / most).read_text().strip()
        if limit != "max":
            yield int(limit) - int((group / taken).read_text()) + _statistic(group, reclaimable)
    except FileNotFoundError:
        return


def _statistic(group: Path, name: str) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
