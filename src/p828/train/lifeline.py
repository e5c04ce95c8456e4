"""What tells the ranks of a run that one of them has died or hangs.

A rank that waits for a dead one in a collective operation finds out late or never, and then all of them complain. So
each rank keeps a connection to rank 0. The system closes it when a process ends, however it ends: rank 0 names the
dead one in one line and ends the others. When nobody has got on for too long, rank 0 collects every rank's stack first.

The connection is watched by a thread, which works while the main thread is inside a collective operation.
"""

import faulthandler
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from p828.errors import RunStopped, UserError
from p828.train.device import machine

if TYPE_CHECKING:
    from p828.train.ranks import Ranks

FILE_NAME = "hang.txt"
LOOK_EVERY = 0.5  # seconds
ANSWER_WITHIN = 15.0  # seconds for a rank's stack
MOURN_WITHIN = 3.0  # seconds in which a death is noticed that made an operation fail
CONNECT_WITHIN = 60.0
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))  # a host gone: 30 s
LAST_OPERATIONS = 5
INTERRUPTED = 130


def join_lifeline(ranks: "Ranks", timeout: float, run_dir: Path) -> "Lifeline":
    """Connect every rank to rank 0; to be called by all."""
    here, hosts = socket.gethostname(), set(ranks.gather(machine()))
    server = _listen("127.0.0.1" if len(hosts) == 1 else "") if ranks.is_first else None
    place = None if server is None else (_address(server), secrets.token_hex(16))
    (address, port), token = next(found for found in ranks.gather(place) if found is not None)
    about: dict[str, Any] = {"rank": ranks.rank, "host": here, "pid": os.getpid()}
    if server is None:
        peers = [_Peer(socket.create_connection((address, port), CONNECT_WITHIN), 0)]
        peers[0].send(token=token, **about)
    else:
        peers = list(_accept(server, ranks.size - 1, token))
        server.close()
    abouts: dict[int, dict[str, Any]] = dict(enumerate(ranks.gather(about)))
    return Lifeline(ranks.rank, peers, abouts, timeout, run_dir / FILE_NAME)


class Lifeline:
    """One rank's end of it: on rank 0 a connection to every other rank, elsewhere one to rank 0."""

    def __init__(
        self, rank: int, peers: list["_Peer"], abouts: dict[int, dict[str, Any]], timeout: float, report: Path
    ) -> None:
        self.rank, self.peers, self.abouts, self.timeout, self.report = rank, peers, abouts, timeout, report
        self._last_progress = time.monotonic()
        self._has_failed = self._has_asked = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="p828-lifeline", daemon=True)
        self._thread.start()

    def progressed(self) -> None:
        self._last_progress, self._has_asked = time.monotonic(), False

    def failed(self, error: BaseException) -> int | None:
        """Have it said why this rank ends. On rank 0, where that is done now, the exit code to end with.

        Elsewhere rank 0 says it; an error that it has told is marked so.
        """
        is_ours = isinstance(error, UserError | RunStopped)
        if not is_ours and not isinstance(error, KeyboardInterrupt):
            # It may be that another rank died during an operation. Then the thread ends this process.
            self._thread.join(MOURN_WITHIN)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1
        if self.rank:
            text = str(error) if is_ours else "".join(traceback.format_exception_only(error)).strip()
            self.peers[0].send(failed=text, code=code)
            self._has_failed = True
            error.is_everywhere = is_ours or code == INTERRUPTED  # type: ignore[attr-defined]
            return None
        # Before the others end: a launcher that sees one end may end this process, too.
        if is_ours or code == INTERRUPTED:
            print(f"p828: {error if is_ours else 'interrupted'}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
            print(f"p828: {self._name(0)} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        self._end_others(code)
        return code

    def close(self) -> None:
        """Leave, without alarm unless this rank has failed."""
        self._closing.set()
        for peer in self.peers:
            if not self._has_failed:
                peer.send(bye=True)
        self._thread.join()
        for peer in self.peers:
            peer.connection.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._closing.is_set():
                for key, _ in selector.select(LOOK_EVERY):
                    peer = key.data
                    for message in peer.receive():
                        self._hear(peer, message)
                    if peer.is_closed:
                        selector.unregister(peer.connection)
                        if not peer.has_left and not self._closing.is_set():
                            self._mourn(peer)
                is_over = self._closing.is_set() or all(peer.has_left for peer in self.peers)
                if time.monotonic() - self._last_progress > self.timeout and not is_over:
                    if self.rank == 0:
                        self._collect(selector)
                    elif self._has_asked:
                        self._give_up()
                    else:
                        self._ask()

    def _hear(self, peer: "_Peer", message: dict[str, Any]) -> None:
        if "bye" in message:
            peer.has_left = True
        elif "failed" in message:
            peer.reason, peer.code = message["failed"], message["code"]
        elif "stack" in message:
            peer.stack = message["stack"]
        elif "hangs" in message:
            self._last_progress = -self.timeout
        elif "write_stack" in message:
            peer.send(stack=stacks())
        elif "end" in message:
            _exit(message["end"])

    def _mourn(self, peer: "_Peer") -> None:
        """Name the rank whose connection closed without a farewell, once, and end."""
        who = self._name(peer.rank)
        if peer.code == INTERRUPTED:
            text = "interrupted"
        elif peer.reason:
            text = f"{who} failed: {peer.reason}"
        else:
            text = f"{who} died; the run ends. The same command goes on from the last checkpoint"
        if self.rank == 0 or (self.rank == 1 and peer.rank == 0):
            print(f"p828: {text}", file=sys.stderr, flush=True)
        self._end_others(peer.code)
        _exit(peer.code)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self.abouts[rank]['host']}, process {self.abouts[rank]['pid']})"

    def _end_others(self, code: int = 1) -> None:
        for peer in self.peers:
            if self.rank == 0 and not peer.is_closed:
                peer.send(end=code)

    def _ask(self) -> None:
        """Have rank 0 collect the stacks and end the run; it is given time for that."""
        self.peers[0].send(hangs=True)
        self._has_asked, self._last_progress = True, time.monotonic() + 2 * ANSWER_WITHIN - self.timeout

    def _give_up(self) -> None:
        """End without rank 0, which hangs with all its threads. Each rank adds its own stack to the file."""
        stack = stacks()
        with self.report.open("a", encoding="utf-8") as file:
            file.write(f"rank {self.rank}\n{stack}\n\n")
        # A launcher ends the others as soon as one has ended: first all write, then rank 1 speaks and ends.
        time.sleep(2 * LOOK_EVERY if self.rank == 1 else ANSWER_WITHIN)
        if self.rank == 1:
            print(
                f"p828: no progress for {self.timeout:g} s, and no answer from {self._name(0)}; the run ends. "
                f"Where the others are: {self.report}\n  rank 1: {_where(stack)}",
                file=sys.stderr,
                flush=True,
            )
        _exit(1)

    def _collect(self, selector: selectors.BaseSelector) -> None:
        """Write every rank's stack to a file, show where each main thread is, and end the run."""
        for peer in self.peers:
            peer.send(write_stack=True)
        found, until = {0: stacks()}, time.monotonic() + ANSWER_WITHIN
        while len(found) <= len(self.peers) and time.monotonic() < until:
            for key, _ in selector.select(LOOK_EVERY):
                for message in key.data.receive():
                    self._hear(key.data, message)
                if key.data.is_closed:
                    selector.unregister(key.data.connection)
            found |= {peer.rank: peer.stack for peer in self.peers if peer.stack}
        lines = [f"no progress for {self.timeout:g} s; the run ends. Where each rank is (whole stacks: {self.report}):"]
        for rank in range(len(self.peers) + 1):
            lines.append(f"  rank {rank}: {_where(found[rank])}" if rank in found else f"  rank {rank}: no answer")
        whole = "\n\n".join(f"rank {rank}\n{text}" for rank, text in sorted(found.items()))
        self.report.write_text("\n".join(lines) + "\n\n" + whole + "\n", encoding="utf-8")
        print("p828: " + "\n".join(lines), file=sys.stderr, flush=True)
        self._end_others()
        _exit(1)


class _Peer:
    """A connection to another rank: JSON objects, one a line."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection, self.rank = connection, rank
        self.has_left = self.is_closed = False
        self.reason, self.code, self.stack = "", 1, ""
        self._rest = b""
        self._sending = threading.Lock()
        connection.settimeout(ANSWER_WITHIN)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_closed = True  # it is gone; whoever reads the connection says so

    def receive(self) -> list[dict[str, Any]]:
        """What has come; `is_closed` once nothing more will."""
        try:
            data = self.connection.recv(2**20)
        except OSError:
            data = b""
        self.is_closed = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def stacks() -> str:
    """Where every thread of this process is, and the last collective operations that PyTorch's flight recorder saw."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read() + _operations()


def _operations() -> str:
    if not torch.distributed.is_nccl_available() or not torch.cuda.is_initialized():
        return ""
    from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

    entries = json.loads(_dump_nccl_trace_json()).get("entries", [])[-LAST_OPERATIONS:]
    keys = ("profiling_name", "state", "input_sizes", "time_discovered_completed_ns")
    return "".join(f"\n  {' '.join(f'{key}={entry.get(key)}' for key in keys)}" for entry in entries)


def _where(stack: str) -> str:
    """The innermost frames of the main thread, which `faulthandler` writes last, innermost first."""
    frames = [line.strip() for line in stack.rpartition("hread 0x")[2].splitlines() if "File" in line]
    return " < ".join(
        f"{Path(frame.split(chr(34))[1]).name}{frame.rpartition(chr(34))[2].replace(', line ', ':')}"
        for frame in frames[:3]
    )


def _listen(address: str) -> socket.socket:
    return socket.create_server((address, 0), backlog=1024)


def _address(server: socket.socket) -> tuple[str, int]:
    """Where the others reach it: on one host by loopback, else by the name that they reach rank 0 by already."""
    host, port = server.getsockname()[:2]
    return (host if host == "127.0.0.1" else os.environ["MASTER_ADDR"]), port


def _accept(server: socket.socket, count: int, token: str) -> Iterator[_Peer]:
    """The other ranks, in the order of their coming; what does not know the token is turned away."""
    server.settimeout(CONNECT_WITHIN)
    while count:
        connection, _ = server.accept()
        peer = _Peer(connection, -1)
        messages: list[dict[str, Any]] = []
        while not messages and not peer.is_closed:
            messages = peer.receive()
        if messages and hmac.compare_digest(str(messages[0].get("token")), token):
            peer.rank, count = messages[0]["rank"], count - 1
            yield peer
        else:
            connection.close()


def _exit(code: int) -> None:
    """End the process from a thread, with the main thread wherever it is."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
