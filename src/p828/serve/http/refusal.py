"""Errors as OpenAI's API answers them: `{"error": {"message", "type", "param", "code"}}` and an HTTP status."""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from p828.serve.scheduling.errors import Closing, DecoderFailed, QueueFull, TimedOut, Unanswered

TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}


class Refused(Exception):
    """A request that is not answered; the message is one line for whoever sent it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        """`param` is the field that is wrong. `headers` are named as in Python, `retry_after`."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: Mapping[str, str] = {name.replace("_", "-"): value for name, value in headers.items()}

    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        code = self.code or HTTPStatus(self.status).phrase.lower().replace(" ", "_")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": code}}

    def response(self) -> Response:
        """In ASCII, since what a client sent may have half a surrogate pair in it, which UTF-8 does not spell."""
        return Response(json.dumps(self.content()), self.status, self.headers, "application/json")


def wrong_field(param: str, message: str) -> Refused:
    return Refused(400, message, param, "invalid_value")


def refusal_of(error: Unanswered) -> Refused:
    """What the scheduler raised, as HTTP has it."""
    if isinstance(error, QueueFull):
        return Refused(429, str(error), code="queue_full", retry_after=str(math.ceil(error.retry_after_seconds)))
    if isinstance(error, TimedOut):
        return Refused(504, str(error), code="timed_out")
    if isinstance(error, Closing):
        return Refused(503, str(error), code="shutting_down")
    assert isinstance(error, DecoderFailed)
    return Refused(500, str(error), code="decoder_failed")
