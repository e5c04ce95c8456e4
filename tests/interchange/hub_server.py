"""A stand-in for the Hugging Face hub on this machine: the part of its HTTP interface that a push uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
LARGE = (".safetensors", ".gguf")  # what the hub keeps in its store of large files


@dataclass
class Hub:
    """What the hub has, and how it is to fail."""

    address: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: what was asked for when it was made."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By repository and path."""
    store: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    requests: list[str] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    """By a part of a request's path: the statuses of its next answers; 0 breaks the connection."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        for part, statuses in self.state.failures.items():
            if part in path and statuses:
                status = statuses.pop(0)
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self._send(status, {"error": f"refused with {status}"})
                return
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        self._send(*self._result(path, body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _result(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._place(wanted) for wanted in json.loads(body)["objects"]]}
        if path.startswith("/store/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/store/")
            self.state.store[path.removeprefix("/store/")] = body
            return 200, {}
        for action in ("preupload", "commit", "tree"):
            if path.endswith(f"/{action}/main"):
                name = path.removeprefix("/api/models/").removesuffix(f"/{action}/main")
                return getattr(self, f"_{action}")(name, body)
        return 404, {"error": "not found"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization'] or 'somebody'}/{wanted['name']}"
        status = 409 if name in self.state.repositories else 200
        self.state.repositories.setdefault(name, wanted)
        self.state.files.setdefault(name, {})
        return status, {"url": f"{self.state.address}/{name}"}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.state.address}/store/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def _preupload(self, name: str, body: bytes) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        return 200, {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}

    def _tree(self, name: str, body: bytes) -> tuple[int, Any]:
        files = self.state.files[name]
        return 200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        files = self.state.files[name]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.state.store[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.state.address}/{name}/commit/1", "commitOid": "1" * 40}
