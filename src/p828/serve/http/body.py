"""The body of a request: JSON, read within bounds of size and time."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from p828.config.strict_json import strict_json
from p828.config.values import shown
from p828.serve.http.refusal import Refused

MOST_BYTES = 2**20  # of a body: a prompt of 250,000 tokens as ids, or of more as text
MOST_DISCARDED = 2**26  # bytes that are still read of a larger one, since many clients hear no answer before their end
SECONDS = 30.0  # for all of a body


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused for what is none, is too large, or comes too slowly."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # Also so that no web page of elsewhere can send one: a browser asks before it sends this type to another host.
        raise Refused(415, f"Content-Type: {shown(kind)} is given: application/json is accepted")
    try:
        content = await asyncio.wait_for(_read(request), SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body took longer than {SECONDS:g} seconds", connection="close") from None
    values = await asyncio.to_thread(_parsed, content)
    if not isinstance(values, dict):
        raise Refused(400, f"the body is {shown(values)}: a JSON object is accepted")
    return values


async def _read(request: Request) -> bytes:
    content, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BYTES:
            content += piece
        elif size > MOST_DISCARDED:
            break
    if size > MOST_BYTES:
        raise Refused(413, f"the body is too large: at most {MOST_BYTES:,} bytes are accepted", connection="close")
    return bytes(content)


def _parsed(content: bytes) -> Any:
    """Raises Refused."""
    try:
        values = strict_json(content.decode("utf-8"))
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, "the body has half a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 text: byte {error.start} is wrong") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    return values
