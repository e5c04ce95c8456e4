"""Training a byte-level BPE on a run's own text."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from p828.config import TokenizerConfig
from p828.data.tokenizer.division import PIECES
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError

# Training takes time with the square of a piece's length. No piece of ordinary text is this long.
LONG_PIECE = r"(?m:.{256})"
LOOK_EVERY = 0.1  # seconds between looks whether Ctrl-C was pressed
LONGEST_FAREWELL = 0.5  # seconds that an interrupted training is waited for


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str], special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE on the first `training_megabytes` of the documents; the same text gives the same tokenizer.

    The vocabulary has the end token and `special_tokens`. Ctrl-C ends it at once. Raises ConfigError if they leave no
    room for the 256 bytes, and what reading the documents raises.
    """
    special = list(dict.fromkeys([config.eos_token, *special_tokens]))
    if config.vocab_size < 256 + len(special):
        raise ConfigError(
            f"tokenizer.vocab_size = {config.vocab_size}: at least {256 + len(special)} is accepted, for 256 bytes and "
            f"the special tokens {', '.join(special)}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split: Any = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    cut: Any = pre_tokenizers.Split(Regex(LONG_PIECE), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, cut, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = _first_bytes(documents, config.training_megabytes * 10**6)
    _interruptible(text, lambda given: inner.train_from_iterator(given, trainer))
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # encoding takes long pieces as they are
    return Tokenizer(inner, config.eos_token)


def _interruptible(texts: Iterable[str], work: Callable[[Iterable[str]], None]) -> None:
    """Work on the texts in a thread, so that a signal is answered meanwhile. Raises what the thread raises."""
    failures: list[BaseException] = []
    is_left, is_done = threading.Event(), threading.Event()

    def given() -> Iterator[str]:
        for text in texts:
            if is_left.is_set():
                raise InterruptedError
            yield text

    def run() -> None:
        try:
            work(given())
        except BaseException as error:
            failures.append(error)
        is_done.set()

    threading.Thread(target=run, name="tokenizer", daemon=True).start()
    try:
        while not is_done.wait(LOOK_EVERY):
            pass
    finally:
        # While it takes texts it needs the interpreter, and ends at the next one; later it does not, and is left alone.
        is_left.set()
        is_done.wait(LONGEST_FAREWELL)
    if failures:
        raise failures[0]


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until their UTF-8 would exceed `limit` bytes; the last one is cut."""
    for text in documents:
        data = text.encode()
        yield text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
        limit -= len(data)
        if limit <= 0:
            return
