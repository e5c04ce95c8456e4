"""The HTTP server: an address to listen at, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from p828.errors import ConfigError, reason
from p828.serve.http.connection import MOST_HEAD_BYTES, SECONDS_TO_ASK, Connection, most_connections
from p828.serve.scheduling.scheduler import Scheduler

GRACE_SECONDS = 25.0  # in which what was accepted is answered at the end
CLOSING_SECONDS = 2.0  # after the grace, for clients to read the last of their answers
MOST_SECONDS = 30  # after which uvicorn cancels what still runs, with a traceback: a fault, as nobody is connected then


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises ConfigError for an address that is not to be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.create_server(address[:2], family=family, backlog=most_connections() // 2)
    except UnicodeError:
        raise ConfigError(f"--host {host}: not the name of a host") from None
    except OSError as error:
        # Python adds the address to what the system says; a name that is not found has a negative number.
        cause = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else reason(error)
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {cause}") from None
    # Connections inherit it. asyncio sets it only where a socket names its protocol, and without it each small piece of
    # an answer waits 40 ms for the client to acknowledge the one before.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url(listening: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which answers what it has accepted before it ends, and leaves signals to the command."""

    def __init__(self, app: Starlette, scheduler: Scheduler) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",  # uvloop, where it is installed, takes the signals that `graceful_shutdown` waits for
                http=Connection,
                backlog=max(most_connections() // 2, 1),  # asyncio takes as many in one go
                h11_max_incomplete_event_size=MOST_HEAD_BYTES,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.ERROR,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Longer than clients keep a connection for their next request, lest both sides decide at a time.
                timeout_keep_alive=int(SECONDS_TO_ASK),
                timeout_graceful_shutdown=MOST_SECONDS,
            )
        )
        self._scheduler = scheduler

    def stop(self) -> None:
        """Take no more connections, and have `run` return when all is answered; from any thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted, and after the grace cut off those clients that do not read."""
        closing = asyncio.create_task(asyncio.to_thread(self._scheduler.close, GRACE_SECONDS))
        loop = asyncio.get_running_loop()
        cutting = loop.call_later(GRACE_SECONDS + CLOSING_SECONDS, self._abort_connections)
        await super().shutdown(sockets)
        cutting.cancel()
        await closing

    def _abort_connections(self) -> None:
        """The requests on them end as those whose client has gone."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
