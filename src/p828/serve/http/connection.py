"""Connections whose client is stuck: one that never asks, and one that never reads its answer."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_TO_ASK = 30.0  # from a connection's first byte, or its opening, to the end of a request's headers
SECONDS_TO_READ = 60.0  # in which a client has to take something of its answer


class Connection(H11Protocol):
    """uvicorn's, which bounds neither, and would keep such connections for ever."""

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asking = self.loop.call_later(SECONDS_TO_ASK, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        has_request = self.cycle is not None and not self.cycle.response_complete
        if has_request and self._asking is not None:
            self._asking.cancel()
            self._asking = None
        elif not has_request and self._asking is None:
            self._asking = self.loop.call_later(SECONDS_TO_ASK, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(SECONDS_TO_READ, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel(self._asking)
        self._cancel(self._reading)

    @staticmethod
    def _cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
