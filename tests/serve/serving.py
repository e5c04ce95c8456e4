"""A server of a tiny model in this process, at a free port."""

import contextlib
import faulthandler
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from exported import save_model
from p828.config import TokenizerConfig
from p828.data.tokenizer.chat_template import built_in
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import NewToken
from p828.inference.load import LoadedModel, load_model
from p828.serve.api.service import Service
from p828.serve.http.app import build_app
from p828.serve.http.server import Server, listen, url
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.scheduler import Scheduler
from tiny import tiny_model

NAME, EOS, CONTEXT, SLOTS = "run", "<|endoftext|>", 128, 4
SECONDS = 60  # after which a test gives up
TEXT = "the cat and the dog sat on the mat "


class Served(NamedTuple):
    url: str
    service: Service
    loaded: LoadedModel
    decoder: Decoder
    server: Server


class HeldDecoder(Decoder):
    """Whose steps wait until they are allowed, so that a test says what happens while a request runs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.allowed = threading.Semaphore(0)
        self.is_free = False
        self.errors: list[Exception] = []
        """Each is raised by a step in place of its work."""

    def allow(self, steps: int) -> None:
        self.allowed.release(steps)

    def free(self) -> None:
        """Let all steps go on from here."""
        self.is_free = True
        self.allow(1)

    def step(self) -> list[NewToken]:
        if not self.is_free:
            assert self.allowed.acquire(timeout=SECONDS)
        if self.errors:
            raise self.errors.pop(0)
        return super().step()


def tokenizer_of(chat: bool) -> Tokenizer:
    special = [EOS, "<|im_start|>", "<|im_end|>"] if chat else [EOS]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=290), [TEXT * 10], special)
    if chat:
        tokenizer.template = built_in("chatml", EOS, tokenizer.special_tokens)
    return tokenizer


def save_tiny(directory: Path, chat: bool = True) -> Path:
    """A run whose tokenizer writes an emoji in four tokens, and whose model has no row but the tokenizer's."""
    tokenizer = tokenizer_of(chat)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    return save_model(directory, model, tokenizer)


@contextmanager
def serving(
    run: Path,
    api_key: str = "",
    decoder: type[Decoder] = Decoder,
    hosts: Set[str] = frozenset(),
    send_bytes: int = 0,
    **limits: Any,
) -> Iterator[Served]:
    """Nothing of any request is left when it ends, unless its decoder broke.

    With `send_bytes` the system holds about as many of an answer that is not read, instead of up to megabytes.
    """
    loaded = load_model(run, "cpu")
    tokenizer = loaded.tokenizer
    own = Limits(**{"max_running": SLOTS, "max_seconds": 120.0, **limits})
    decoding = decoder(loaded.model, tokenizer.vocab_size, tokenizer.eos_id, loaded.dtype, own.max_running)
    metrics = Metrics(NAME, CONTEXT)
    scheduler = Scheduler(decoding, own, metrics)
    service = Service(scheduler, tokenizer, metrics, own, NAME, 0, 8)
    server = Server(build_app(service, api_key, hosts), scheduler)
    scheduler.start()
    with listen("127.0.0.1", 0) as listening:
        if send_bytes:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)  # its connections inherit it
        address = url(listening)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Served(address, service, loaded, decoding, server)
        finally:
            if isinstance(decoding, HeldDecoder):
                decoding.free()
            server.stop()
            thread.join()
    scheduler.close(60)  # a test may have the server leave the decoder's thread behind
    if scheduler.failure is None:
        scheduler.check_idle()


def connected(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(SECONDS)
    return connection


def asking(served: Served, path: str = "/v1/completions", **fields: Any) -> socket.socket:
    """A connection on which a request was sent, and no answer read."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = connected(served)
    connection.sendall(head.encode() + body)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes; a server that reads no further may cut off what it has said."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            content += piece
    return content


def wait_until(holds: Callable[[], bool]) -> None:
    """For what another thread does soon; where it does not, standard error says what all threads are at."""
    end = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > end:
            faulthandler.dump_traceback()
            raise AssertionError(f"still not so after {SECONDS} seconds")
        time.sleep(0.001)
