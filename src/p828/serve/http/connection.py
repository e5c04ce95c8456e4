"""Connections whose client never asks, asks what is no HTTP, or never reads its answer, and too many of them."""

import asyncio
import fcntl
import resource
import struct
import termios

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from p828.serve.http.refusal import Refused

SECONDS_TO_ASK = 30.0  # from a connection's first byte, or its opening, to the end of a request's headers
MOST_HEAD_BYTES = 2**14  # of a request's first line and headers
MOST_CONNECTIONS = 4096
SECONDS_TO_READ = 60.0  # in which a client has to take something of its answer


class Connection(H11Protocol):
    """uvicorn's, which would keep such connections for ever, and answers what is no HTTP in plain text."""

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asking = self.loop.call_later(SECONDS_TO_ASK, transport.abort)
        if len(self.connections) > most_connections():
            self._make_room()

    def _make_room(self) -> None:
        """Cut the connection that has asked nothing for longest; maybe this one."""
        found = [(one, one._ask_by()) for one in self.connections if isinstance(one, Connection)]
        waiting = {one: time for one, time in found if time is not None}
        min(waiting, key=waiting.__getitem__).transport.abort()

    def _ask_by(self) -> float | None:
        """When it is cut unless it asks, in the loop's time; None of one that is answered, or cut already."""
        timer = self._asking or self.timeout_keep_alive_task  # the second between two requests
        return None if timer is None or self.transport.is_closing() else timer.when()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        has_request = self.cycle is not None and not self.cycle.response_complete
        if has_request and self._asking is not None:
            self._asking.cancel()
            self._asking = None
        elif not has_request and self._asking is None:
            self._asking = self.loop.call_later(SECONDS_TO_ASK, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """To what is no request, as all errors are answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            line = f"this is no request of HTTP/1.1, or its head has more than {MOST_HEAD_BYTES:,} bytes"
            response = Refused(400, line, connection="close").response()
            for event in (
                h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel(self._reading)

    def _await_reader(self) -> None:
        self._reading = self.loop.call_later(SECONDS_TO_READ, self._abort_unless_read, unsent_bytes(self.transport))

    def _abort_unless_read(self, unsent_before: int) -> None:
        """A slow reader may take long until writing is resumed, which needs nearly all of the buffer to be sent."""
        if unsent_bytes(self.transport) < unsent_before:
            self._await_reader()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel(self._asking)
        self._cancel(self._reading)

    @staticmethod
    def _cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def most_connections() -> int:
    """Half of the files that the system lets this process open; a quarter may be accepted before others are cut."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(files // 2, MOST_CONNECTIONS)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """That the client's side has not taken: those in the transport's buffer and in the system's, which holds megabytes
    and asks for more of them only when a good part is free."""
    waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return transport.get_write_buffer_size() + struct.unpack("i", waiting)[0]
