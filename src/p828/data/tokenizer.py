"""The tokenizer: trained on the run's own source, read from a file, or fetched from the hub."""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from p828.config import TokenizerConfig
from p828.data.special_tokens import BYTE_TOKEN, keep_out_of_text, settle_end_token
from p828.data.text.hub import download_tokenizer
from p828.data.text.shard import BadRecord
from p828.data.tokenizer_trial import LONGEST_CAUSE, SAMPLES, try_out
from p828.errors import ConfigError, DataError, P828Error
from p828.files import MEBIBYTE, read_limited, write_atomic

# cl100k_base's pattern (tiktoken) with single digits: a word takes the space or the sign before it, a run of
# indentation is one piece but for the space that belongs to the next word, signs take the newlines behind them.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Training takes time with the square of a piece's length. No piece of ordinary text is this long.
LONG_PIECE = r"(?m:.{256})"
LOOK_EVERY = 0.1  # seconds between looks whether Ctrl-C was pressed
LONGEST_FAREWELL = 0.5  # seconds that an interrupted training is waited for
LARGEST_FILE = 256 * MEBIBYTE  # ten times the largest that is in use
LARGEST_VOCABULARY = 2**21  # twice the largest that is in use
SAMPLED_CHARACTERS = 200_000  # of a run's text, to see whether it comes back from its tokens
CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what cut-off UTF-8 is decoded to
# The same character as whole tokens spell it: byte-level, and in byte tokens.
WHOLE_REPLACEMENTS = ("ï¿½", "<0xEF><0xBF><0xBD>")
MOST_READINGS = 8  # after which a Unigram's scores no longer change; one or two are usual
FAILS = "the tokenizer fails on a text"


class Tokenizer:
    """Text to token ids and back.

    Text is only ever text: the name of a special token inside a document becomes ordinary tokens. Equal text becomes
    equal tokens: BPE dropout that a file asks for is left out.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos_token: str) -> None:
        """Raises ConfigError when `eos_token` is not in the vocabulary, or is what ordinary text becomes."""
        inner.no_truncation()
        inner.no_padding()
        inner = _settled(inner)
        self._json: str = inner.to_str()
        spec = json.loads(self._json)
        self.dropout: float | None = spec["model"].get("dropout")
        """The BPE dropout that the file asks for, which is switched off."""
        if self.dropout is not None:
            inner.model.dropout = None
        self.eos_id: int = settle_end_token(inner, spec, eos_token)
        keep_out_of_text(inner, spec, eos_token)
        self.inner = inner
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"a token has the id {self.vocab_size - 1}: at most {LARGEST_VOCABULARY - 1} is accepted")

    @classmethod
    def from_file(cls, path: str | Path, eos_token: str) -> "Tokenizer":
        """Raises ConfigError when the file cannot be read, is no tokenizer, or lacks `eos_token`."""
        return cls._from_json(_read(Path(path)), str(path), eos_token)

    @classmethod
    def tried(cls, path: Path, eos_token: str) -> "Tokenizer":
        """From a file that was never used before. Raises ConfigError also when it fails on text, or takes too long."""
        text = _read(path)
        _check_ids(text, str(path))
        try_out(text, str(path))
        made = cls._from_json(text, str(path), eos_token)
        for sample in (*SAMPLES, eos_token, made.inner.decode([made.eos_id], skip_special_tokens=False)):
            if made.eos_id in made.encode(sample):
                raise ConfigError(
                    f"{path}: tokenizer.eos_token = {eos_token!r}: text becomes this token, as {sample[:20]!r} does; "
                    "one that only ends a document is accepted"
                )
        return made

    @classmethod
    def _from_json(cls, text: str, where: str, eos_token: str) -> "Tokenizer":
        _check_ids(text, where)
        with _answered(f"{where}: not a tokenizer.json"):
            inner = tokenizers.Tokenizer.from_str(text)
        try:
            with _answered("not usable as a tokenizer"):
                return cls(inner, eos_token)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens. Raises DataError when the tokenizer fails on the text."""
        with _answered(FAILS, DataError):
            ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """Token ids of each text with EOS behind them, on all cores and outside the interpreter's lock.

        Raises DataError when the tokenizer fails on a text.
        """
        with _answered(FAILS, DataError):
            encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int64) for encoding in encodings]

    def encode_counted(self, texts: list[str]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """As `encode_documents`, each with the bytes of UTF-8 text that its tokens stand for.

        A token has what lies between the end of the one before and its own, the last one all the rest: so the bytes of
        a document are those of its text, whatever the tokenizer makes of it. Its end has none.
        """
        with _answered(FAILS, DataError):
            encodings = self.inner.encode_batch(texts, add_special_tokens=False)
        counted = []
        for text, encoding in zip(texts, encodings, strict=True):
            code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            sizes = 1 + sum((code_points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
            bounds = np.concatenate([[0], np.cumsum(sizes)])
            ends = np.array([end for _, end in encoding.offsets] or [0], dtype=np.int64)
            bytes_before = np.maximum.accumulate(bounds[np.minimum(ends, len(text))])
            bytes_before[-1] = bounds[-1]
            counts = np.diff(bytes_before, prepend=0)
            ids = np.array([*encoding.ids, self.eos_id], dtype=np.int64)
            counted.append((ids, np.append(counts, 0) if encoding.ids else counts))
        return counted

    def spelled_bytes(
        self, tokens: npt.NDArray[np.int64], document_ids: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Bytes of text that a row's tokens are decoded to, [S+1], for where the text itself is not at hand.

        Exact for every token of a byte-level vocabulary. With others, what is right is the first token's and the sum of
        each document's other tokens in the row, which stands at the last of them.
        """
        if self._byte_counts is not None:
            return self._byte_counts[tokens]
        counts = np.zeros(len(tokens), dtype=np.int64)
        for document in range(int(document_ids.max()) + 1):
            places = np.flatnonzero((document_ids == document) & (tokens != self.eos_id))
            if not len(places):
                continue
            if places[0] == 0:
                counts[0] = _whole_bytes(self.decode(tokens[:1]))
            first = counts[0] if places[0] == 0 < places[-1] else 0
            counts[places[-1]] = max(_whole_bytes(self.decode(tokens[places])) - first, 0)
        return counts

    @cached_property
    def _byte_counts(self) -> npt.NDArray[np.int64] | None:
        """Bytes of each id of a byte-level vocabulary, whose tokens are spelled with a character a byte; else None."""
        spec = json.loads(self._json)
        if '"ByteLevel"' not in json.dumps(spec["decoder"]):
            return None
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.inner.get_vocab(with_added_tokens=False).items():
            counts[token_id] = len(token)
        for added in spec["added_tokens"]:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        counts[self.eos_id] = 0
        return counts

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens left out. Cut-off UTF-8 becomes U+FFFD."""
        with _answered("the tokenizer fails to decode", DataError):
            text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def ends_whole(self, ids: Iterable[int]) -> bool:
        """Whether a U+FFFD at the end of the decoded text is a character of it, and not a cut-off one."""
        tokens = [self.inner.id_to_token(int(i)) or "" for i in ids]
        return bool(tokens) and (CUT_CHARACTER in tokens[-1] or "".join(tokens).endswith(WHOLE_REPLACEMENTS))

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a single byte, which those behind it decide about: bytes in a row are decoded together."""
        return BYTE_TOKEN.fullmatch(self.inner.id_to_token(token_id) or "") is not None

    def to_json(self) -> str:
        """What `save` writes: as it was given, since what was changed for its use is changed again when it is read."""
        text: str = tokenizers.Tokenizer.from_str(self._json).to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write the file so that it is there whole or not at all. Raises ConfigError when it cannot be written."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self.to_json())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer, in hexadecimal."""
        return hashlib.sha256(self._json.encode()).hexdigest()


def load_tokenizer(
    config: TokenizerConfig, documents: Callable[[], Iterable[str]], model_vocab_size: int, saved: Path
) -> Tokenizer:
    """The run's tokenizer: `saved` if it exists, else made as `config` says and written to `saved`.

    Args:
        documents: opens the text that a tokenizer is trained on; called for `train` only.
        model_vocab_size: rows of the model's embedding, which the vocabulary may not exceed; 0 for as many as it needs.

    Raises ConfigError; `saved` is written only when all is well.
    """
    if saved.exists():
        source, tokenizer = str(saved), Tokenizer.from_file(saved, config.eos_token)
    elif config.name == "train":
        if 0 < model_vocab_size < config.vocab_size:  # a run's own may have come out smaller
            raise ConfigError(
                f"tokenizer.vocab_size = {config.vocab_size}: a vocabulary of {config.vocab_size} exceeds "
                f"model.vocab_size = {model_vocab_size}; with 0 there the model has what it needs"
            )
        source, tokenizer = "tokenizer.vocab_size", train_tokenizer(config, documents())
    else:
        path = Path(config.name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        elif path.suffix != ".json" and not path.exists():
            path = download_tokenizer(config.name)
        source, tokenizer = config.name, Tokenizer.tried(path, config.eos_token)
    if 0 < model_vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer's vocabulary of {tokenizer.vocab_size} exceeds "
            f"model.vocab_size = {model_vocab_size}"
        )
    if not saved.exists():
        tokenizer.save(saved)
    return tokenizer


def remarks(config: TokenizerConfig, tokenizer: Tokenizer, documents: Iterable[str]) -> list[str]:
    """What a user should know of a tokenizer that is taken over, a line each; the first of the documents are read.

    Raises ConfigError when it fails on them. One that was trained here has nothing to be said of.
    """
    lines = []
    if tokenizer.dropout:
        lines.append(
            f"tokenizer.name = {config.name}: its BPE dropout of {tokenizer.dropout:g} is switched off, so that equal "
            "text becomes equal tokens"
        )
    share = 0.0 if config.name == "train" else lost_share(tokenizer, documents)
    if share > 0:
        shown = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
        lines.append(
            f"tokenizer.name = {config.name}: {shown} of the text does not come back from its tokens, in a sample of "
            "the training documents: characters that it does not know or that it changes"
        )
    return lines


def lost_share(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
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
    """Those before a bad record, which training tells of when it comes to it."""
    with contextlib.suppress(BadRecord):
        yield from documents


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE on the first `training_megabytes` of the documents; the same text gives the same tokenizer.

    Ctrl-C ends it at once. Raises what reading the documents raises.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split: Any = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    cut: Any = pre_tokenizers.Split(Regex(LONG_PIECE), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, cut, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.eos_token],
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


def _read(path: Path) -> str:
    try:
        return read_limited(path, LARGEST_FILE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a tokenizer.json: {error}") from None


def _check_ids(text: str, where: str) -> None:
    """Raises ConfigError for an id that no vocabulary has: the library takes memory for every id up to the largest."""
    try:
        spec = json.loads(text)
        vocabulary = spec["model"].get("vocab")
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ())]
        ids += [token["id"] for token in spec.get("added_tokens") or ()]
        largest = max((number for number in ids if isinstance(number, int)), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return  # no tokenizer.json; the library says what is wrong with it
    if largest >= LARGEST_VOCABULARY:
        raise ConfigError(f"{where}: a token has the id {largest}: at most {LARGEST_VOCABULARY - 1} is accepted")


def _settled(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as it comes back from its file: reading rounds a Unigram's scores, which fingerprints see."""
    for _ in range(MOST_READINGS if isinstance(inner.model, models.Unigram) else 0):
        written = inner.to_str()
        inner = tokenizers.Tokenizer.from_str(written)
        if inner.to_str() == written:
            break
    return inner


@contextmanager
def _answered(what: str, kind: type[P828Error] = ConfigError) -> Iterator[None]:
    """Raises the error for what the tokenizers library raises: plain exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {' '.join(str(error).split())[:LONGEST_CAUSE]}") from None


def _bytes_of(characters: Counter[str]) -> int:
    return sum(len(character.encode()) * count for character, count in characters.items())


def _whole_bytes(text: str) -> int:
    """Bytes of decoded text, a byte for each that was cut off at either end."""
    whole = text.strip(CUT_CHARACTER)
    return len(whole.encode()) + len(text) - len(whole)
