"""A server of a tiny model in this process, at a free port."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from exported import save_model
from p828.config import TokenizerConfig
from p828.data.tokenizer.chat_template import built_in
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.inference.decode.decoder import Decoder
from p828.inference.load import LoadedModel, load_model
from p828.serve.app import build_app
from p828.serve.limits import Limits
from p828.serve.metrics import Metrics
from p828.serve.scheduler import Scheduler
from p828.serve.server import Server, listen, url
from p828.serve.service import Service
from tiny import tiny_model

NAME, EOS, CONTEXT, SLOTS = "run", "<|endoftext|>", 128, 4
TEXT = "the cat and the dog sat on the mat "


class Served(NamedTuple):
    url: str
    service: Service
    loaded: LoadedModel

    def check_idle(self) -> None:
        self.service.scheduler.check_idle()


def tokenizer_of(chat: bool) -> Tokenizer:
    special = [EOS, "<|im_start|>", "<|im_end|>"] if chat else [EOS]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=290), [TEXT * 10], special)
    if chat:
        tokenizer.template = built_in("chatml", EOS, tokenizer.special_tokens)
    return tokenizer


def save_tiny(directory: Path, chat: bool = True) -> Path:
    """A run whose tokenizer writes an emoji in four tokens."""
    model = tiny_model(vocab_size=290, max_position_embeddings=CONTEXT)
    return save_model(directory, model, tokenizer_of(chat))


@contextmanager
def serving(run: Path, api_key: str = "", decoder: type[Decoder] = Decoder, **limits: Any) -> Iterator[Served]:
    """Nothing of any request is left when it ends."""
    loaded = load_model(run, "cpu")
    tokenizer = loaded.tokenizer
    own = Limits(**{"max_running": SLOTS, "max_seconds": 120.0, **limits})
    decoding = decoder(loaded.model, tokenizer.vocab_size, tokenizer.eos_id, loaded.dtype, own.max_running)
    metrics = Metrics(NAME, CONTEXT)
    scheduler = Scheduler(decoding, own, metrics)
    service = Service(scheduler, tokenizer, metrics, own, NAME, 0, 8)
    server = Server(build_app(service, api_key), scheduler)
    scheduler.start()
    with listen("127.0.0.1", 0) as listening:
        address = url(listening)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Served(address, service, loaded)
        finally:
            server.stop()
            thread.join()
    scheduler.check_idle()
