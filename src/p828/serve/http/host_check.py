"""Which names of this machine a request may be sent to, so that no web page of elsewhere asks by a visitor's browser.

A page whose own name is made to lead to this machine is, to its browser, of the same origin as the server: nothing but
the Host header tells such a request apart.
"""

from collections.abc import Set

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from p828.config.values import shown
from p828.serve.http.refusal import Refused

LOCAL = ("localhost", "127.0.0.1", "[::1]")


def local_hosts(host: str) -> frozenset[str]:
    """Of a server that listens at `host`, an address of this machine that no other one reaches."""
    return frozenset([*LOCAL, f"[{host}]".lower() if ":" in host else host.lower()])


class HostCheck:
    """Lets those requests pass whose Host header is one of these names, with any port or none."""

    def __init__(self, app: ASGIApp, hosts: Set[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if scope["type"] != "http" or _name(given) in self._hosts:
            await self._app(scope, receive, send)
            return
        accepted = ", ".join(sorted(self._hosts))
        line = f"Host: {shown(given)} is given: {accepted} are accepted, with any port, as the server has no key"
        await Refused(403, line, code="wrong_host").response()(scope, receive, send)


def _name(host: str) -> str:
    """Without the port; an IPv6 address is in brackets."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and not port.endswith("]") else host.lower()
