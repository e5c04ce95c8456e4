"""Two hosts on one machine: network namespaces with a link of a chosen rate between them, and a loopback each.

Needs Linux, root's rights, and iproute2 (`ip`, `tc`) and util-linux (`unshare`, `nsenter`). The namespaces have no
names: the kernel removes them, and the link with them, when their last process ends. `hosts_with_link` ends them all.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

LINK = "p828"  # the interface's name on either host
PORT = 29500
PROGRAMS = ("ip", "tc", "unshare", "nsenter")


class Host(NamedTuple):
    number: int
    address: str
    holder: int
    """The process that keeps the namespaces."""

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs on this host."""
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", f"--uts=/proc/{self.holder}/ns/uts", *arguments]

    def call(self, *arguments: str) -> str:
        """Run a command here to its end; what it printed. Raises CalledProcessError."""
        return subprocess.run(self.command(*arguments), check=True, capture_output=True, text=True).stdout

    def processes(self) -> list[int]:
        """Of all processes on this host."""
        own, found = (Path(f"/proc/{self.holder}/ns/net").stat().st_ino, [])
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):  # it has ended meanwhile, or is no process
                if (entry / "ns/net").stat().st_ino == own:
                    found.append(int(entry.name))
        return found


def obstacle() -> str:
    """Why there can be no hosts here; empty if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} (iproute2, util-linux)"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *_rate(100)],
        capture_output=True,
        text=True,
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@contextmanager
def hosts_with_link(megabits: float) -> Iterator[list[Host]]:
    """Two hosts with a link of so many Mbit a second either way. Nothing is left of them when the block ends."""
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(number)) for number in range(2)]
        ends = [part for host in hosts for part in ("name", LINK, "netns", str(host.holder))]
        subprocess.run(["ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:]], check=True)
        for host in hosts:
            host.call("ip", "address", "add", f"{host.address}/24", "dev", LINK)
            host.call("ip", "link", "set", LINK, "up")
            host.call("ip", "link", "set", "lo", "up")
            host.call("tc", "qdisc", "add", "dev", LINK, "root", "tbf", *_rate(megabits))
        yield hosts


def _rate(megabits: float) -> tuple[str, ...]:
    """A bucket for a packet that TCP has not cut yet, and a queue that drops none."""
    return ("rate", f"{megabits}mbit", "burst", "128kb", "limit", "16mb")


@contextmanager
def _host(number: int) -> Iterator[Host]:
    # `cat` ends when this process does, whatever ends it, since nobody holds the other end of its input then.
    named = f"echo p828-host-{number} > /proc/sys/kernel/hostname && echo ready && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", named], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    host = Host(number, f"10.88.0.{number + 1}", holder.pid)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise OSError(f"no namespaces: {obstacle()}")
        yield host
    finally:
        if holder.poll() is None:
            for process in host.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, SIGKILL)
        holder.communicate()


def run_on_nodes(hosts: Sequence[Host | None], processes: int, program: Sequence[str], within: float) -> None:
    """Run a program by torchrun to its end: a node on each host, or on this machine for None, of so many processes.

    Raises RuntimeError, with the end of what they said, if nodes fail or are not done within so many seconds.
    """
    address, port = ("127.0.0.1", _free_port()) if hosts[0] is None else (hosts[0].address, PORT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said, ExitStack() as stack:
        nodes = []
        for number, host in enumerate(hosts):
            where = ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--nproc-per-node", str(processes)]
            there = ["--master-addr", address, "--master-port", str(port)]
            command = [sys.executable, "-m", "torch.distributed.run", *where, *there, *program]
            if host is not None:
                command = host.command("env", f"GLOO_SOCKET_IFNAME={LINK}", *command)
            node = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            stack.callback(_end, node)
            nodes.append(node)
        ends = time.monotonic() + within
        try:
            codes = [node.wait(max(ends - time.monotonic(), 0)) for node in nodes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        if any(codes):
            said.seek(0)
            late = "" if time.monotonic() < ends else f"\nnot done in {within:.0f} s"
            raise RuntimeError(said.read()[-20000:] + late)


def _end(node: subprocess.Popen[bytes]) -> None:
    if node.poll() is None:
        node.terminate()  # torchrun ends its processes then
        node.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
