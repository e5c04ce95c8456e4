"""The watchdog's connections: a socket between rank 0 and every other rank, which only the run's ranks can open."""

import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from p828.errors import RunFailed
from p828.system.device import machine

CONNECT_WITHIN = 60.0  # seconds
SEND_WITHIN = 15.0  # seconds
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # seconds; a host gone is noticed in 30
LONGEST_GREETING = 4096  # bytes that whoever has not named the token may send


class Peer:
    """A connection to another rank, which carries JSON objects, one a line; and what that rank has sent."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection, self.rank = connection, rank
        self.has_left = False
        """It ended its part of the run in order."""
        self.is_closed = False
        """The connection is closed."""
        self.reason, self.code = "", 1
        """Why it fails, if it has sent that, and the exit code for it."""
        self.stack = ""
        """The stacks of its threads, once it has sent them."""
        self._rest = b""
        self._sending = threading.Lock()
        connection.settimeout(SEND_WITHIN)
        _keep_alive(connection)

    def send(self, **message: Any) -> None:
        """Send one message; where the other rank is gone, `is_closed` is set instead."""
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_closed = True  # whoever reads the connection notices it

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. `is_closed` is set once no more can. Raises ValueError for what is no JSON."""
        try:
            data = self.connection.recv(2**20)
        except OSError:
            data = b""
        self.is_closed = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def connect(rank: int, size: int, all_gather_object: Callable[[Any], list[Any]]) -> list[Peer]:
    """On rank 0 a connection to every other rank, elsewhere the one to rank 0; all ranks must call it.

    `all_gather_object` returns every rank's value, by rank. Raises RunFailed where a rank cannot be reached.
    """
    hosts = set(all_gather_object(machine()))
    server = socket.create_server(("127.0.0.1" if len(hosts) == 1 else "", 0), backlog=1024) if rank == 0 else None
    place = None if server is None else (_address(server), secrets.token_hex(16))
    address, token = next(found for found in all_gather_object(place) if found is not None)
    if server is None:
        return [greet(address, token, rank)]
    with server:
        return accept(server, size, token, CONNECT_WITHIN)


def _address(server: socket.socket) -> tuple[str, int]:
    """Where the other ranks reach rank 0: by loopback on one host, else by the name that the launcher gave it."""
    host, port = server.getsockname()[:2]
    return (host if host == "127.0.0.1" else os.environ["MASTER_ADDR"]), port


def greet(address: tuple[str, int], token: str, rank: int) -> Peer:
    """Connect to rank 0 and name the token. Raises RunFailed if rank 0 cannot be reached."""
    try:
        peer = Peer(socket.create_connection(address, CONNECT_WITHIN), 0)
    except OSError as error:
        place = f"{address[0]}, port {address[1]}"
        raise RunFailed(f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {place}: {error}") from None
    peer.send(token=token, rank=rank)
    return peer


def accept(server: socket.socket, size: int, token: str, within: float) -> list[Peer]:
    """Connections of the other ranks, in the order of their coming.

    Whoever does not name the token, which only the ranks know, is turned away. All are listened to at once, so that a
    stranger who sends nothing does not delay the ranks. Raises RunFailed if a rank has not come `within` seconds.
    """
    until, peers = time.monotonic() + within, list[Peer]()
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
                        peers.append(Peer(key.fileobj, rank))  # type: ignore[arg-type]
            if time.monotonic() > until and len(peers) < size - 1:
                missing = sorted(set(range(1, size)) - {peer.rank for peer in peers})
                raise RunFailed(f"rank 0 waited {within:g} s for the connections of ranks {missing}")
        for key in list(selector.get_map().values()):  # strangers who have not sent a line yet
            if key.data is not None:
                key.fileobj.close()  # type: ignore[union-attr]
    return peers


def _has_greeted(connection: socket.socket, received: bytearray) -> bool | None:
    """Append what has come to `received`. True once it is a whole line, False if it cannot become one, else None."""
    try:
        data = connection.recv(LONGEST_GREETING - len(received))
    except OSError:
        return False
    received += data
    if b"\n" in data:
        return True
    return None if data and len(received) < LONGEST_GREETING else False


def _greeting(line: bytes, token: str) -> int | None:
    """The rank that a line names; None if the line does not name the token, too."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("token"), str):
        return None
    is_known = hmac.compare_digest(message["token"].encode("utf-8", "replace"), token.encode())
    return message["rank"] if is_known else None


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice that the other host is gone, where the system offers that."""
    with suppress(OSError):  # a hardened system refuses; the watchdog's time-out notices a hang all the same
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
