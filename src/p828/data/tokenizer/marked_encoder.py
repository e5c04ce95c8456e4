"""Marked text to tokens: control tokens where the template wrote them, and which tokens are the assistant's."""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tokenizers

from p828.data.tokenizer.marked_text import CONTROL, ControlTokens, spans_of

TOKEN = np.dtype([("id", np.int64), ("is_target", np.bool_), ("text_bytes", np.int64)])
"""A token, whether the assistant says it, and the bytes of UTF-8 text that it stands for; a control token has none."""


class MarkedEncoder:
    """A tokenizer whose special tokens are found by their names with `CONTROL` before them, and by these alone.

    The tokens of a conversation are so those that transformers makes of the rendered text, but for messages that
    spell a special token: there it is text.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """`inner` makes no special token of text (`special_tokens.keep_out_of_text`)."""
        spec = json.loads(inner.to_str())
        added = spec["added_tokens"]
        special = [token for token in added if token["special"]]
        spec["added_tokens"] = [token for token in added if not token["special"]]
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        options = ("single_word", "lstrip", "rstrip", "normalized")
        self._inner.add_special_tokens(
            [
                tokenizers.AddedToken(CONTROL + token["content"], special=True, **{key: token[key] for key in options})
                for token in special
            ]
        )
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self._ids = np.arange(max(vocabulary.values()) + 1)  # the tokenizer's own, by those of this one
        for token in added:
            self._ids[vocabulary[CONTROL * token["special"] + token["content"]]] = token["id"]
        self.control = ControlTokens([token["content"] for token in special])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.void]]:
        """The tokens of each marked text, as `TOKEN`s, on all cores and outside the interpreter's lock."""
        found = [spans_of(text) for text in texts]
        encodings = self._inner.encode_batch([text for text, _ in found], add_special_tokens=False)
        return [self._tokens(text, spans, encoding) for (text, spans), encoding in zip(found, encodings, strict=True)]

    def _tokens(
        self, text: str, spans: Sequence[tuple[int, int]], encoding: tokenizers.Encoding
    ) -> npt.NDArray[np.void]:
        tokens = np.zeros(len(encoding.ids), dtype=TOKEN)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        tokens["id"] = self._ids[np.array(encoding.ids, dtype=np.int64)]
        tokens["is_target"] = _overlaps(places, np.array(spans, dtype=np.int64).reshape(-1, 2))
        tokens["text_bytes"] = _text_bytes(text, places[:, 1], self.control.ranges(text))
        return tokens


def _overlaps(places: npt.NDArray[np.int64], spans: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether each token has a character in one of the spans, which are in order and apart."""
    if not len(spans):
        return np.zeros(len(places), dtype=np.bool_)
    span = np.searchsorted(spans[:, 1], places[:, 0], side="right")  # the first that ends behind the token's beginning
    begins = np.append(spans[:, 0], np.iinfo(np.int64).max)[span]
    is_in: npt.NDArray[np.bool_] = begins < places[:, 1]
    return is_in


def _text_bytes(text: str, ends: npt.NDArray[np.int64], control: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Bytes from the end of the token before to each token's own; a control token's name counts none."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = np.ones(len(text), dtype=np.int64)
    for least in (0x80, 0x800, 0x10000):
        sizes += code_points >= least
    for begin, end in control:
        sizes[begin:end] = 0
    before = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(np.maximum.accumulate(before[np.minimum(ends, len(text))]), prepend=0)
