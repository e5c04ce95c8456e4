"""Text to token ids and back, with whatever tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models

from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.division import borders, has_places, parts_of
from p828.data.tokenizer.marked_encoder import MarkedEncoder
from p828.data.tokenizer.special_tokens import BYTE_TOKEN, keep_out_of_text, settle_end_token
from p828.data.tokenizer.tokenizer_config import read_template
from p828.data.tokenizer.trial import LONGEST_CAUSE, SAMPLES, try_out
from p828.data.tokenizer.windows import encode_in_windows
from p828.errors import ConfigError, DataError, P828Error, reason
from p828.files import MEBIBYTE, read_limited, write_atomic

LARGEST_FILE = 256 * MEBIBYTE  # ten times the largest that is in use
LARGEST_VOCABULARY = 2**21  # twice the largest that is in use
CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what cut-off UTF-8 is decoded to
# The same character as whole tokens spell it: byte-level, and in byte tokens.
WHOLE_REPLACEMENTS = ("ï¿½", "<0xEF><0xBF><0xBD>")
MOST_READINGS = 8  # after which a Unigram's scores no longer change; one or two are usual
LONG_TEXT, PART, PARTS_TOGETHER = 2**19, 2**15, 8  # characters; a longer text is encoded in parts
LARGEST_PART = 2 * PART
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
        inner = _as_read_again(inner)
        self._json: str = inner.to_str()
        spec = json.loads(self._json)
        self.dropout: float | None = spec["model"].get("dropout")
        """The BPE dropout that the file asks for, which is switched off."""
        if self.dropout is not None:
            inner.model.dropout = None
        self.eos_id: int = settle_end_token(inner, spec, eos_token)
        keep_out_of_text(inner, spec, eos_token)
        self.inner = inner
        special = [token["content"] for token in spec["added_tokens"] if token["special"]]
        self.special_tokens: list[str] = list(dict.fromkeys([*special, eos_token]))
        self.template: ChatTemplate | None = None
        """How conversations are written, if it is to write them."""
        self._gives_text: dict[int, bool] = {}
        self._borders: re.Pattern[str] | None = borders(spec)
        """Where a long text may be divided without changing its tokens."""
        self._has_places = has_places(spec)
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"a token has the id {self.vocab_size - 1}: at most {LARGEST_VOCABULARY - 1} is accepted")

    @classmethod
    def from_file(cls, path: str | Path, eos_token: str) -> "Tokenizer":
        """With the chat template that lies beside it, if one does.

        Raises ConfigError when the file cannot be read, is no tokenizer, or lacks `eos_token`.
        """
        made = cls._from_json(_read(Path(path)), str(path), eos_token)
        made.template = read_template(Path(path).parent, made.special_tokens, eos_token)
        return made

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
        short = [text for text in texts if len(text) < LONG_TEXT]
        with _answered(FAILS, DataError):
            encodings = iter(self.inner.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.append(self._long_ids(text), self.eos_id)
            if len(text) >= LONG_TEXT
            else np.array([*next(encodings).ids, self.eos_id], dtype=np.int64)
            for text in texts
        ]

    def encode_marked(self, texts: list[str]) -> list[npt.NDArray[np.void]]:
        """The `marked_encoder.TOKEN`s of conversations as marked text, without EOS, as `encode_documents`.

        Raises DataError when the tokenizer fails on a text.
        """
        with _answered(FAILS, DataError):
            return self._marked_encoder.encode(texts)

    @cached_property
    def _marked_encoder(self) -> MarkedEncoder:
        return MarkedEncoder(self.inner)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which a model has ended: the end of a document, and of an answer."""
        token = self.template.end_token if self.template else ""
        found = self.inner.token_to_id(token) if token else None
        return (self.eos_id,) if found in (None, self.eos_id) else (self.eos_id, found)

    def _long_ids(self, text: str) -> npt.NDArray[np.int64]:
        return np.concatenate([ids for ids, _ in self._encoded_parts(text, self.inner.encode_batch_fast)])

    def _encoded_parts(
        self, text: str, encode_batch: Callable[..., list[tokenizers.Encoding]]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The ids of a long text and where each of its tokens ends, a part at a time.

        The library takes hundreds of bytes for each token, so only a few parts are encoded at a time. Where no borders
        are known, or none come for long, windows that overlap take their place.
        """
        parts = iter([text] if self._borders is None else parts_of(text, self._borders, PART))
        most = LARGEST_PART if self._has_places else len(text)
        start = 0
        while together := list(islice(parts, PARTS_TOGETHER)):
            with _answered(FAILS, DataError):
                encoded = encode_batch([part for part in together if len(part) <= most], add_special_tokens=False)
            encodings = iter(encoded)
            for part in together:
                found = [_ids_and_ends(next(encodings))] if len(part) <= most else encode_in_windows(part, self._placed)
                for ids, ends in found:
                    yield ids, ends + start
                start += len(part)

    def _placed(self, text: str) -> tokenizers.Encoding:
        """The tokens of a text with their places in it."""
        with _answered(FAILS, DataError):
            return self.inner.encode(text, add_special_tokens=False)

    def encode_counted(self, texts: list[str]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """As `encode_documents`, each with the bytes of UTF-8 text that its tokens stand for.

        A token counts the text from the end of the token before it to its own end, and the last token all the rest. So
        the bytes of a document are those of its text, whatever the tokenizer makes of it. EOS counts none.
        """
        short = [text for text in texts if len(text) < LONG_TEXT]
        with _answered(FAILS, DataError):
            encodings = iter(self.inner.encode_batch(short, add_special_tokens=False))
        return [
            self._counted(
                text,
                [_ids_and_ends(next(encodings))]
                if len(text) < LONG_TEXT
                else self._encoded_parts(text, self.inner.encode_batch),
            )
            for text in texts
        ]

    def _counted(
        self, text: str, parts: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The ids and bytes of a text from its encoded parts, as `_encoded_parts` gives them."""
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        sizes = 1 + sum((code_points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        ids, ends = map(np.concatenate, zip(*parts, strict=True))
        if not len(ids):
            return np.array([self.eos_id]), bounds[-1:]
        bytes_before = np.maximum.accumulate(bounds[np.minimum(ends, len(text))])
        bytes_before[-1] = bounds[-1]
        return np.append(ids, self.eos_id), np.append(np.diff(bytes_before, prepend=0), 0)

    def spells(self, texts: Iterable[str], documents: Iterable[npt.NDArray[np.int64]]) -> bool:
        """Whether `spelled_bytes` of each document's tokens are as many as its text has."""
        return all(
            self.spelled_bytes(ids, np.zeros(len(ids), dtype=np.int32)).sum() == len(text.encode())
            for text, ids in zip(texts, documents, strict=True)
        )

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

    def gives_text(self, token_id: int) -> bool:
        """Whether a token by itself is text: a special one is none, nor a single byte, nor a space that some tokenizers
        drop at the end.
        """
        known = self._gives_text.get(token_id)
        if known is None:
            known = self._gives_text[token_id] = not self.is_byte(token_id) and self.decode([token_id]) != ""
        return known

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
            raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer, in hexadecimal."""
        return hashlib.sha256(self._json.encode()).hexdigest()


def _ids_and_ends(encoding: tokenizers.Encoding) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ids, and where in the text each token ends: 0 if the library was not asked for it."""
    ends = (end for _, end in encoding.offsets)
    return np.array(encoding.ids, dtype=np.int64), np.fromiter(ends, dtype=np.int64, count=len(encoding))


def _read(path: Path) -> str:
    try:
        return read_limited(path, LARGEST_FILE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a tokenizer.json: {reason(error)}") from None


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


def _as_read_again(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
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


def _whole_bytes(text: str) -> int:
    """Bytes of decoded text, a byte for each that was cut off at either end."""
    whole = text.strip(CUT_CHARACTER)
    return len(whole.encode()) + len(text) - len(whole)
