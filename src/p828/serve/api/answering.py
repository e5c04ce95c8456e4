"""Sending answers: whole, or piece by piece as server-sent events; given up when their client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from p828.serve.api.choice import Choice, Piece
from p828.serve.api.service import cancel
from p828.serve.http.refusal import refusal_of
from p828.serve.scheduling.errors import Unanswered

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had an answer."""


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices, in the order in which they come. Raises what the first that fails raises."""
    arrived: asyncio.Queue[tuple[Choice, Piece | Exception | None]] = asyncio.Queue(maxsize=len(choices))

    async def forward(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                await arrived.put((choice, piece))
            await arrived.put((choice, None))
        except Exception as error:
            await arrived.put((choice, error))

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    running = len(choices)
    try:
        while running:
            choice, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                running -= 1
            else:
                yield choice, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result. Raises ClientGone, the work cancelled, once the client has closed its connection."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_closed(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _closed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole_response(request: Request, choices: Sequence[Choice], answer: Awaitable[dict[str, Any]]) -> Response:
    """The answer once it is there. Raises Unanswered and ClientGone."""
    try:
        return JSONResponse(await unless_gone(request.receive, answer))
    finally:
        cancel(choices)


class EventStream(Response):
    """Server-sent events of choices, which are given up when the client goes.

    What fails before the first event is answered with its status; what fails later is an event with the error.
    """

    def __init__(self, choices: Sequence[Choice], events: AsyncGenerator[dict[str, Any], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # which nginx reads: pass on at once
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._choices, self._events = choices, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):  # nobody is left to be told
                await unless_gone(receive, self._send(scope, receive, send))
        finally:
            cancel(self._choices)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    if not has_begun:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        has_begun = True
                    await send({"type": "http.response.body", "body": _data(event), "more_body": True})
                last = b"data: [DONE]\n\n"
            except Unanswered as error:
                if not has_begun:
                    await refusal_of(error).response()(scope, receive, send)
                    return
                last = _data(refusal_of(error).content())
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
