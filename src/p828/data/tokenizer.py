"""The tokenizer: trained on the run's own source, read from a file, or fetched from the hub."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from p828.config import TokenizerConfig
from p828.data.hub import download_tokenizer
from p828.errors import UserError
from p828.files import MEBIBYTE, read_limited, write_atomic

# cl100k_base's pattern (tiktoken) with single digits: a word takes the space or the sign before it, a run of
# indentation is one piece but for the space that belongs to the next word, signs take the newlines behind them.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_CAUSE = 300  # characters of what a library says
LARGEST_FILE = 256 * MEBIBYTE  # ten times the largest that is in use
SPECIAL_FREE_SPACE = "▁"  # a space in vocabularies that are not byte-level


class Tokenizer:
    """Text to token ids and back.

    Text is only ever text: the name of a special token inside a document becomes ordinary tokens.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos_token: str) -> None:
        """Raises UserError when `eos_token` is not in the vocabulary."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        eos_id = inner.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"tokenizer.eos_token = {eos_token!r}: not in the tokenizer's vocabulary")
        self.inner = inner
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""

    @classmethod
    def from_file(cls, path: str | Path, eos_token: str) -> "Tokenizer":
        """Raises UserError when the file cannot be read, is no tokenizer, or lacks `eos_token`."""
        try:
            text = read_limited(Path(path), LARGEST_FILE).decode("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a tokenizer.json: {error}") from None
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json: {str(error)[:LONGEST_CAUSE]}") from None
        try:
            return cls(inner, eos_token)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """Token ids of each text with EOS behind them, on all cores and outside the interpreter's lock."""
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens left out. Cut-off UTF-8 becomes U+FFFD."""
        text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 text that each token stands for, [vocab_size]; 0 for special tokens and unused ids.

        Exact for byte-level BPE; other vocabularies are counted by their tokens' spelling.
        """
        spec = json.loads(self.inner.to_str())
        byte_level = '"ByteLevel"' in json.dumps(spec["decoder"])
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.inner.get_vocab(with_added_tokens=False).items():
            counts[token_id] = len(token) if byte_level else _spelled_bytes(token)
        for added in spec["added_tokens"]:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return counts

    def to_json(self) -> str:
        """What `save` writes."""
        text: str = self.inner.to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write the file so that it is there whole or not at all. Raises UserError when it cannot be written."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self.to_json())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer, in hexadecimal."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()


def load_tokenizer(
    config: TokenizerConfig, documents: Callable[[], Iterable[str]], model_vocab_size: int, saved: Path
) -> Tokenizer:
    """The run's tokenizer: `saved` if it exists, else made as `config` says and written to `saved`.

    Args:
        documents: opens the text that a tokenizer is trained on; called for `train` only.
        model_vocab_size: rows of the model's embedding, which the vocabulary may not exceed.

    Raises UserError; `saved` is written only when all is well.
    """
    if saved.exists():
        source, tokenizer = str(saved), Tokenizer.from_file(saved, config.eos_token)
    elif config.name == "train":
        source, tokenizer = "tokenizer.vocab_size", train_tokenizer(config, documents())
    else:
        path = Path(config.name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        elif path.suffix != ".json" and not path.exists():
            path = download_tokenizer(config.name)
        source, tokenizer = config.name, Tokenizer.from_file(path, config.eos_token)
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"{source}: the tokenizer's vocabulary of {tokenizer.vocab_size} exceeds "
            f"model.vocab_size = {model_vocab_size}"
        )
    if not saved.exists():
        tokenizer.save(saved)
    return tokenizer


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE on the first `training_megabytes` of the documents; the same text gives the same tokenizer."""
    inner = tokenizers.Tokenizer(models.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split: Any = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_first_bytes(documents, config.training_megabytes * 10**6), trainer)
    return Tokenizer(inner, config.eos_token)


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until their UTF-8 would exceed `limit` bytes; the last one is cut."""
    for text in documents:
        data = text.encode()
        yield text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
        limit -= len(data)
        if limit <= 0:
            return


def _spelled_bytes(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace(SPECIAL_FREE_SPACE, " ").encode())
