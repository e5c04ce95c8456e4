"""The tokenizer that a run asks for: trained on its own source, read from a file, or fetched from the hub."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from p828.config import TokenizerConfig
from p828.data.text.hub import download_tokenizer
from p828.data.text.shard import BadRecord
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import template_for, template_of_trained
from p828.data.tokenizer.training import train_tokenizer
from p828.errors import ConfigError

SAMPLED_CHARACTERS = 200_000  # of a run's text, to see whether it comes back from its tokens


def load_tokenizer(
    config: TokenizerConfig,
    documents: Callable[[], Iterable[str]],
    model_vocab_size: int,
    saved: Path | None = None,
    is_chat: bool = False,
) -> Tokenizer:
    """The run's tokenizer: `saved` if it exists, else made as `config` says and written to `saved`, if that is given.

    It has the chat template beside `saved`, else the one that `config` names; for conversations (`is_chat`) it has one
    in any case. The template is not written.

    Args:
        documents: opens the text that a tokenizer is trained on; called for `train` only.
        model_vocab_size: rows of the model's embedding, which the vocabulary may not exceed; 0 for as many as it needs.

    Raises ConfigError; `saved` is written only when all is well.
    """
    directory = None  # of what belongs to the tokenizer
    if saved is not None and saved.exists():
        source, tokenizer = str(saved), Tokenizer.from_file(saved, config.eos_token)
    elif config.name == "train":
        if 0 < model_vocab_size < config.vocab_size:  # a run's own may have come out smaller
            raise ConfigError(
                f"tokenizer.vocab_size = {config.vocab_size}: a vocabulary of {config.vocab_size} exceeds "
                f"model.vocab_size = {model_vocab_size}; with 0 there the model has what it needs"
            )
        template = template_of_trained(config, is_chat)
        special_tokens = [] if template is None else template.control.tokens
        source, tokenizer = "tokenizer.vocab_size", train_tokenizer(config, documents(), special_tokens)
    else:
        path = Path(config.name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        elif path.suffix != ".json" and not path.exists():
            path = download_tokenizer(config.name, with_template=is_chat and not config.chat_template)
        source, tokenizer, directory = config.name, Tokenizer.tried(path, config.eos_token), path.parent
    if 0 < model_vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer's vocabulary of {tokenizer.vocab_size} exceeds "
            f"model.vocab_size = {model_vocab_size}"
        )
    if tokenizer.template is None:
        tokenizer.template = template_for(config, tokenizer.special_tokens, directory, is_chat)
    if saved is not None and not saved.exists():
        tokenizer.save(saved)
    return tokenizer


def remarks(config: TokenizerConfig, tokenizer: Tokenizer, documents: Iterable[str]) -> list[str]:
    """What a user should know of a new run's tokenizer, a line each.

    The first of the documents are read for one that is taken over. Raises DataError when it fails on them.
    """
    lines = []
    if config.name == "train" and tokenizer.vocab_size < config.vocab_size:
        lines.append(
            f"tokenizer.vocab_size = {config.vocab_size:,}: the tokenizer has {tokenizer.vocab_size:,} tokens, as "
            "there is nothing left to join in the text that it was trained on"
        )
    if tokenizer.dropout:
        lines.append(
            f"tokenizer.name = {config.name}: its BPE dropout of {tokenizer.dropout:g} is switched off, so that equal "
            "text becomes equal tokens"
        )
    fraction = 0.0 if config.name == "train" else lost_fraction(tokenizer, documents)
    if fraction > 0:
        shown = f"{fraction:.1%}" if fraction >= 0.001 else "less than 0.1%"
        lines.append(
            f"tokenizer.name = {config.name}: {shown} of the text does not come back from its tokens, in a sample of "
            "the training documents: characters that it does not know or that it changes"
        )
    return lines


def lost_fraction(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
    """Share of the bytes of the first documents that decoding their tokens does not give back, or gives besides."""
    left, all_bytes, lost_bytes = SAMPLED_CHARACTERS, 0, 0
    for document in _readable(documents):
        text = document[:left]
        back = tokenizer.decode(tokenizer.encode(text))
        all_bytes += len(text.encode())
        if back != text:
            before, after = Counter(text), Counter(back)
            lost_bytes += max(_bytes_of(before - after), _bytes_of(after - before), 1)
        left -= len(text)
        if left <= 0:
            break
    return min(lost_bytes / all_bytes, 1.0) if all_bytes else 0.0


def _readable(documents: Iterable[str]) -> Iterator[str]:
    """Those before a bad record, which training reports when it gets there."""
    with contextlib.suppress(BadRecord):
        yield from documents


def _bytes_of(characters: Counter[str]) -> int:
    return sum(len(character.encode()) * count for character, count in characters.items())
