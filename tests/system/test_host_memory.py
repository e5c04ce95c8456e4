"""How much memory a process may still take: limits that are made here, of the process and in a made-up /sys."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from p828.system.host_memory import free_host_bytes

GROUP = "job/step"


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)


def in_group(root: Path, line: str) -> None:
    write(root / "proc" / "self", cgroup=line)


def test_alone_it_is_the_machines_and_several_share_it(tmp_path: Path) -> None:
    assert free_host_bytes(1, tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert free_host_bytes(8, tmp_path) == pytest.approx(psutil.virtual_memory().available / 8, rel=0.2)


def test_a_group_of_version_2_and_those_above_it(tmp_path: Path) -> None:
    in_group(tmp_path, f"0::/{GROUP}\n")
    top = tmp_path / "sys" / "fs" / "cgroup"
    write(top / GROUP, memory__max="max\n", memory__current="5000\n")
    write(
        top / "job", memory__max="90000\n", memory__current="20000\n", memory__stat="anon 15000\ninactive_file 4000\n"
    )
    assert free_host_bytes(1, tmp_path) == 90_000 - 20_000 + 4_000
    assert free_host_bytes(2, tmp_path) == 37_000
    write(top / GROUP, memory__max="6000\n")
    assert free_host_bytes(1, tmp_path) == 1000
    write(top / GROUP, memory__max="4000\n")
    assert free_host_bytes(1, tmp_path) == 0


def test_a_container_of_version_1_whose_group_has_its_hosts_name(tmp_path: Path) -> None:
    in_group(tmp_path, "5:cpu,cpuacct:/docker/4711\n4:memory:/docker/4711\n0::/\n")
    top = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    write(top, memory__limit_in_bytes="7000\n", memory__usage_in_bytes="3000\n", memory__stat="total_inactive_file 9\n")
    assert free_host_bytes(1, tmp_path) == 4009


LIMITED = """
import json, resource, sys, psutil, torch
from pathlib import Path
from p828.runs import checkpoint, file_names
from p828.train import checkpointing as background_saver
from p828.train.checkpointing import AsyncCheckpointer
from p828.system.host_memory import free_host_bytes
from p828.distributed.group import ProcessGroup

directory, free, spare = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tensors = {"model": {"a": torch.ones(16 * 2**20)}}  # 64 MiB
saver = AsyncCheckpointer(directory, ProcessGroup(), torch.device("cpu"))
background_saver.SPARE_BYTES = spare
limit = psutil.Process().memory_info().vms + free
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
found = free_host_bytes()
is_written = saver.start(1, tensors, {})
saved = saver.finish()
checkpoint.verify(directory / file_names.name_of(1))
print(json.dumps([found, is_written, saved.copy_bytes]))
"""


@pytest.mark.parametrize("spare", [2**20, -(2**30)], ids=["no room is seen", "room is thought to be there"])
def test_under_a_limit_of_the_address_space_it_is_saved_without_a_copy(tmp_path: Path, spare: int) -> None:
    free = 48 * 2**20
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(free), str(spare)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    found, is_written, copy_bytes = json.loads(said.stdout)
    assert found <= free
    assert is_written
    assert copy_bytes == 0
