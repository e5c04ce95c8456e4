"""The page served to this machine's browsers, with news of the runs while they train."""

import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from p828.errors import ConfigError, P828Error
from p828.report.page import page, payload
from p828.report.run import ReportedRun

HOST = "127.0.0.1"
HOSTS = ("localhost", "127.0.0.1")
POLICY = "frame-ancestors 'none'"


class ReportServer(ThreadingHTTPServer):
    """Answers `/` with the page, `/data` with the newest numbers, `/detail/RUN/NAME` with a column of all steps."""

    daemon_threads = True

    def __init__(self, runs: Sequence[ReportedRun], port: int) -> None:
        """Raises ConfigError for a port that cannot be had; 0 is any free one."""
        self.runs, self.reading, self.version = runs, threading.Lock(), 0
        try:
            super().__init__((HOST, port), _Answer)
        except OSError as error:
            raise ConfigError(f"--port {port}: cannot be listened at: {error.strerror}; 0 takes a free one") from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def read(self) -> None:
        """Read what the runs have written since. A change has another `version`."""
        for run in self.runs:
            self.version += run.update()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before it has its answer is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOSTS:  # another site's name that was made to lead here
            self._send(403, "text/plain", "only this machine's browsers are answered\n")
            return
        address = urlsplit(self.path)
        with self.server.reading:
            try:
                self._answer(unquote(address.path), parse_qs(address.query).get("after", [""])[0])
            except P828Error as error:
                self._send(503, "text/plain", f"{error}\n")

    def _answer(self, path: str, after: str) -> None:
        server = self.server
        if path in ("/", "/data"):
            server.read()
        if path == "/":
            self._send(200, "text/html", "".join(page(server.runs, server.version)))
        elif path == "/data" and after == str(server.version):
            self._send(204, "text/plain", "")
        elif path == "/data":
            self._send(200, "application/json", json.dumps(payload(server.runs, server.version), allow_nan=False))
        elif (packed := self._detail(path)) is not None:
            self._send(200, "text/plain", packed)
        else:
            self._send(404, "text/plain", "no such page\n")

    def _detail(self, path: str) -> str | None:
        parts = path.removeprefix("/").split("/", 2)
        if len(parts) != 3 or parts[0] != "detail" or not parts[1].isdecimal():
            return None
        number = int(parts[1])
        return self.server.runs[number].detail(parts[2]) if number < len(self.server.runs) else None

    def _send(self, status: int, media_type: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{media_type}; charset=utf-8"), ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", POLICY),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are not news."""
