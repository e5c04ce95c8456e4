"""The page that the server gives at `/`: files of this package, which load nothing from elsewhere."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = ("index.html", "page.css", "page.js", "server.js", "answer.js", "detail.js")
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    # The page's own meta element says what it may load; that nobody frames it can be said in a header only.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route each; they ask for no key, for the page itself tells nothing."""
    return [_route(name) for name in FILES]


def _route(name: str) -> Route:
    content = (files("p828") / "serve" / "http" / "page" / name).read_bytes()
    media_type = MEDIA_TYPES[name.rsplit(".", 1)[1]]

    async def give(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return Route("/" if name == "index.html" else f"/{name}", give)
