"""The routes, who may use them, and how errors are answered."""

import hmac
from collections.abc import Set

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from p828.config.values import shown
from p828.serve.api.answering import ClientGone
from p828.serve.api.chat import chat
from p828.serve.api.completions import complete
from p828.serve.api.service import Service
from p828.serve.api.tokens import detokenize, tokenize
from p828.serve.http.host_check import HostCheck
from p828.serve.http.refusal import Refused, refusal_of
from p828.serve.http.web_page import page_routes
from p828.serve.scheduling.errors import Unanswered


def build_app(service: Service, api_key: str = "", hosts: Set[str] = frozenset()) -> Starlette:
    """The server as an ASGI application.

    With a key, only who sends it is answered, but for the page and `/health`. With `hosts`, only requests to one of
    these names are.
    """
    open_routes = [*page_routes(), Route("/health", health)]
    middleware = [Middleware(HostCheck, hosts)] if hosts else []
    if api_key:
        middleware.append(Middleware(KeyCheck, api_key, {route.path for route in open_routes}))
    app = Starlette(
        routes=[
            *open_routes,
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            Refused: _answer_refused,
            Unanswered: _answer_unanswered,
            HTTPException: _answer_http,
            ClientGone: _answer_nobody,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_fault,
        },
    )
    app.state.service = service
    return app


class KeyCheck:
    """Lets those pass who send `Authorization: Bearer KEY`. The comparison takes as long for every wrong key."""

    def __init__(self, app: ASGIApp, api_key: str, open_paths: set[str]) -> None:
        self._app, self._key, self._open_paths = app, api_key.encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._has_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        line = "the header Authorization: Bearer KEY is missing, or has another key than this server's"
        refused = Refused(401, line, code="invalid_api_key", www_authenticate="Bearer")
        await refused.response()(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)


async def health(request: Request) -> Response:
    """Whether the server takes requests."""
    service: Service = request.app.state.service
    failure = service.scheduler.failure
    if failure is not None:
        raise Refused(503, f"the decoder failed: {failure}", code="decoder_failed")
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_description(request.app.state.service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(request.path_params["name"])
    return JSONResponse(_description(service))


def _description(service: Service) -> dict[str, object]:
    """OpenAI's fields, vLLM's `max_model_len`, and what the page shows."""
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "p828",
        "max_model_len": service.scheduler.max_length,
        "chat": service.tokenizer.template is not None,
        "n_routed_experts": service.n_routed_experts,
    }


async def _answer_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _answer_unanswered(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unanswered)
    return refusal_of(error).response()


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the router refuses: a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    words = {404: "no such path here", 405: f"{allowed} is accepted"}.get(error.status_code, error.detail)
    line = f"{shown(request.method)} {shown(request.scope['path'])}: {words}"
    response = Refused(error.status_code, line).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client has gone: what is sent reaches nobody, and the status is the one that nginx logs then."""
    return Response(status_code=499)


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A fault of the server, whose traceback is printed."""
    return Refused(500, "the server has a fault, which it has printed").response()
