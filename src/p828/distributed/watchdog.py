"""What tells the ranks of a run that one of them has died or hangs.

A rank that waits for a dead one in a collective operation finds out late or never, and then all of them complain. So
each rank keeps a connection to rank 0. The system closes it when a process ends, however it ends: rank 0 names the
dead one in one line and ends the others. When nobody has got on for too long, rank 0 collects every rank's stack first.

The connection is watched by a thread, which works while the main thread is inside a collective operation.
"""

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from p828.errors import ConfigError, RunStopped
from p828.files import open_appended, write_atomic
from p828.runs.layout import HANG_FILE
from p828.system.device import machine

LOOK_EVERY = 0.5  # seconds
ANSWER_WITHIN = 15.0  # seconds for a rank's stack
MOURN_WITHIN = 3.0  # seconds in which a death is noticed that made an operation fail
CONNECT_WITHIN = 60.0
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # seconds; a host gone is noticed in 30
LONGEST_GREETING = 4096  # bytes that whoever has not named the token may send
LAST_OPERATIONS = 5
INTERRUPTED = 130


def connect_watchdog(
    rank: int, size: int, gather: Callable[[Any], list[Any]], timeout: float, run_dir: Path
) -> "Watchdog":
    """Connect every rank to rank 0; to be called by all. `gather` gives everyone's value, by rank."""
    hosts = set(gather(machine()))
    server = socket.create_server(("127.0.0.1" if len(hosts) == 1 else "", 0), backlog=1024) if rank == 0 else None
    place = None if server is None else (_address(server), secrets.token_hex(16))
    address, token = next(found for found in gather(place) if found is not None)
    if server is None:
        peers = [_greet(address, token, rank)]
    else:
        with server:
            peers = _accept(server, size, token, CONNECT_WITHIN)
    about: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    abouts: dict[int, dict[str, Any]] = dict(enumerate(gather(about)))
    return Watchdog(rank, peers, abouts, timeout, run_dir / HANG_FILE)


class Watchdog:
    """One rank's end of it: on rank 0 a connection to every other rank, elsewhere one to rank 0."""

    def __init__(
        self, rank: int, peers: list["_Peer"], abouts: dict[int, dict[str, Any]], timeout: float, report: Path
    ) -> None:
        self.rank, self.peers, self.abouts, self.timeout, self.report = rank, peers, abouts, timeout, report
        self._last_progress = time.monotonic()
        self._has_failed = self._has_asked = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch_or_end, name="p828-watchdog", daemon=True)
        self._thread.start()

    def progressed(self) -> None:
        self._last_progress, self._has_asked = time.monotonic(), False

    def failed(self, error: BaseException) -> int | None:
        """Have it said why this rank ends. On rank 0, where that is done now, the exit code to end with.

        Elsewhere rank 0 says it; an error that it has told is marked so.
        """
        is_ours = isinstance(error, ConfigError | RunStopped)
        if not is_ours and not isinstance(error, KeyboardInterrupt):
            # It may be that another rank died during an operation. Then the thread ends this process.
            self._thread.join(MOURN_WITHIN)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError) else 1
        if self.rank:
            text = str(error) if is_ours else "".join(traceback.format_exception_only(error)).strip()
            self.peers[0].send(failed=text, code=code)
            self._has_failed = True
            error.is_everywhere = is_ours or code == INTERRUPTED  # type: ignore[attr-defined]
            return None
        # Before the others end: a launcher that sees one end may end this process, too.
        if is_ours or code == INTERRUPTED:
            _say(f"p828: {error if is_ours else 'interrupted'}")
        else:
            _say("".join(traceback.format_exception(error)).rstrip())
            _say(f"p828: {self._name(0)} failed: {type(error).__name__}: {error}")
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

    def _watch_or_end(self) -> None:
        """Without its watcher a run could hang for ever: whatever goes wrong in here ends it, and is shown."""
        try:
            self._watch()
        except BaseException:
            _say(traceback.format_exc().rstrip())
            _say(f"p828: the watcher of {self._name(self.rank)} failed; the run ends")
            self._end_others()
            _exit(1)

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
            _say(f"p828: {text}")
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
        where = self._reported(stack, is_whole=False)
        # A launcher ends the others as soon as one has ended: first all write, then rank 1 speaks and ends.
        time.sleep(2 * LOOK_EVERY if self.rank == 1 else ANSWER_WITHIN)
        if self.rank == 1:
            _say(
                f"p828: no progress for {self.timeout:g} s, and no answer from {self._name(0)}; the run ends. "
                f"Where the others are: {where}\n  rank 1: {_where(stack)}"
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
        lines = [
            f"  rank {rank}: {_where(found[rank]) if rank in found else 'no answer'}"
            for rank in range(len(self.peers) + 1)
        ]
        whole = "\n\n".join(f"rank {rank}\n{text}" for rank, text in sorted(found.items()))
        said = f"no progress for {self.timeout:g} s; the run ends. Where each rank is"
        where = self._reported("\n".join([f"{said}:", *lines]) + "\n\n" + whole, is_whole=True)
        _say("\n".join([f"p828: {said} (whole stacks: {where}):", *lines]))
        self._end_others()
        _exit(1)

    def _reported(self, text: str, is_whole: bool) -> str:
        """Write to the report, all of it or this rank's part; in words, where it is, or why it is nowhere."""
        try:
            if is_whole:
                write_atomic(self.report, text + "\n")
            else:
                with open_appended(self.report) as file:
                    file.write(f"rank {self.rank}\n{text}\n\n".encode())
        except OSError as error:
            return f"{self.report} cannot be written: {error.strerror or error}"
        return str(self.report)


class _Peer:
    """A connection to another rank: JSON objects, one a line."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection, self.rank = connection, rank
        self.has_left = self.is_closed = False
        self.reason, self.code, self.stack = "", 1, ""
        self._rest = b""
        self._sending = threading.Lock()
        connection.settimeout(ANSWER_WITHIN)
        _keep_alive(connection)

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
    """Where every thread of this process is, innermost frames first, the main thread last.

    And the last collective operations that PyTorch's flight recorder saw. It needs no file, and so no room on a disk.
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
    if not torch.distributed.is_nccl_available() or not torch.cuda.is_initialized():
        return ""
    from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

    entries = json.loads(_dump_nccl_trace_json()).get("entries", [])[-LAST_OPERATIONS:]
    keys = ("profiling_name", "state", "input_sizes", "time_discovered_completed_ns")
    return "".join(f"\n  {' '.join(f'{key}={entry.get(key)}' for key in keys)}" for entry in entries)


def _where(stack: str) -> str:
    """The innermost frames of the main thread, as `stacks` wrote them."""
    frames = [line.strip() for line in stack.rpartition("Thread 0x")[2].splitlines() if "File" in line]
    return " < ".join(
        f"{Path(frame.split(chr(34))[1]).name}{frame.rpartition(chr(34))[2].replace(', line ', ':')}"
        for frame in frames[:3]
    )


def _address(server: socket.socket) -> tuple[str, int]:
    """Where the others reach it: on one host by loopback, else by the name that they reach rank 0 by already."""
    host, port = server.getsockname()[:2]
    return (host if host == "127.0.0.1" else os.environ["MASTER_ADDR"]), port


def _greet(address: tuple[str, int], token: str, rank: int) -> _Peer:
    """A connection to rank 0. Raises RunStopped if it cannot be reached."""
    try:
        peer = _Peer(socket.create_connection(address, CONNECT_WITHIN), 0)
    except OSError as error:
        place = f"{address[0]}, port {address[1]}"
        raise RunStopped(f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {place}: {error}") from None
    peer.send(token=token, rank=rank)
    return peer


def _accept(server: socket.socket, size: int, token: str, within: float) -> list[_Peer]:
    """The other ranks, in the order of their coming. Raises RunStopped if some have not come `within` these seconds.

    Whoever does not name the token, which only the ranks know, is turned away. All are listened to at once, so that a
    stranger who says nothing keeps nobody waiting.
    """
    until, peers = time.monotonic() + within, list[_Peer]()
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(peers) < size - 1:
            for key, _ in selector.select(max(until - time.monotonic(), 0)):
                if key.data is None:
                    with suppress(OSError):  # whoever came has gone already
                        connection, _ = server.accept()
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                elif (is_done := _has_greeted(key.fileobj, key.data)) is not None:  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                    rank = _greeting(key.data, token) if is_done else None
                    if rank is None:
                        key.fileobj.close()  # type: ignore[union-attr]
                    else:
                        peers.append(_Peer(key.fileobj, rank))  # type: ignore[arg-type]
            if time.monotonic() > until and len(peers) < size - 1:
                missing = sorted(set(range(1, size)) - {peer.rank for peer in peers})
                raise RunStopped(f"rank 0 waited {within:g} s for the connections of ranks {missing}")
        for key in list(selector.get_map().values()):  # strangers who have not said anything yet
            if key.data is not None:
                key.fileobj.close()  # type: ignore[union-attr]
    return peers


def _has_greeted(connection: socket.socket, heard: bytearray) -> bool | None:
    """Add what has come to `heard`. True once it is a whole line, False if it cannot become one, None until then."""
    try:
        data = connection.recv(LONGEST_GREETING - len(heard))
    except OSError:
        return False
    heard += data
    if b"\n" in data:
        return True
    return None if data and len(heard) < LONGEST_GREETING else False


def _greeting(line: bytes, token: str) -> int | None:
    """The rank that a line with the token names, which only a rank knows."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("token"), str):
        return None
    is_known = hmac.compare_digest(message["token"].encode("utf-8", "replace"), token.encode())
    return message["rank"] if is_known else None


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice when the other host is gone, as far as it offers that."""
    with suppress(OSError):  # a hardened one refuses; a hang is noticed all the same
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _say(text: str) -> None:
    """Print it to standard error; where nobody can read that, what follows is done all the same."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """End the process from a thread, with the main thread wherever it is."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also when nobody reads them
        os._exit(code)
