"""A long text that is tokenized in parts, beside the whole of it."""

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from p828.config import TokenizerConfig
from p828.data.tokenizer import division as text_division
from p828.data.tokenizer import tokenizer as tokenizer_module
from p828.data.tokenizer import windows
from p828.data.tokenizer.division import parts_of
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from tokenizer_kinds import EOS, KINDS, TRAINING_TEXT

ODD = [
    *"aZ9 \n\t\r.,'-_/<>", "  ", "\n\n", " \n ", "\r\n", "cat", "The", "12", "don't", "it's", "'LL",
    "é", "e\u0301", "\u0301", "Å", "数据", "한국어", "🙂", "\ufb01", "Σ", "İ", "½", "\u3000", "\u00a0", "\u2028",
    "\ufffd", "▁", "▁▁", EOS, "<unk>", "<p>", "a" * 30, " " * 30, "9" * 20, "#" * 20,
]  # fmt: skip


def own() -> tokenizers.Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=320, eos_token=EOS), TRAINING_TEXT).inner


def with_pattern(name: str) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        inner = KINDS["byte_level"]()
        split: Any = pre_tokenizers.Split(Regex(getattr(text_division, name)), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        return inner

    return make


def with_prefix() -> tokenizers.Tokenizer:
    inner = KINDS["byte_level"]()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return inner


def lower_case() -> tokenizers.Tokenizer:
    inner = KINDS["byte_level"]()
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return inner


def with_words_added() -> tokenizers.Tokenizer:
    inner = KINDS["byte_level"]()
    inner.add_tokens([AddedToken("a 9"), AddedToken("cat-12")])
    return inner


def with_all_before() -> tokenizers.Tokenizer:
    """Something stands before each text."""
    inner = KINDS["byte_fallback"]()
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def never() -> tokenizers.Tokenizer:
    """A pattern that nobody knows: what comes before decides."""
    inner = KINDS["byte_level"]()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?<=a) "), "isolated")
    return inner


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    **KINDS, "own": own, "gpt2": with_pattern("GPT2"), "cl100k": with_pattern("CL100K"), "qwen2": with_pattern("QWEN2"),
    **{make.__name__: make for make in (with_prefix, lower_case, with_words_added, with_all_before, never)},
}  # fmt: skip
WHOLE = {"whole_words_first", "with_words_added", "with_all_before", "never"}  # that are not divided


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_become_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 1)
    tokenizer = Tokenizer(MAKERS[kind](), EOS)
    assert (tokenizer._borders is None) == (kind in WHOLE)
    draw = random.Random(kind)
    texts = ["".join(draw.choices(ODD, k=draw.randint(1, 60))) for _ in range(1500)]
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 10**9)
    whole, counted = tokenizer.encode_documents(texts), tokenizer.encode_counted(texts)
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 1)
    for size, together in ((1, 1), (7, 3)):
        monkeypatch.setattr(tokenizer_module, "PART", size)
        monkeypatch.setattr(tokenizer_module, "PARTS_TOGETHER", together)
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            assert ids.tolist() == [*tokenizer.inner.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]
        for pair, expected in zip(tokenizer.encode_counted(texts), counted, strict=True):
            assert all(map(np.array_equal, pair, expected))
    assert all(map(np.array_equal, tokenizer.encode_documents(texts), whole))


def with_unknown(make: Callable[[], tokenizers.Tokenizer]) -> Callable[[], tokenizers.Tokenizer]:
    def made() -> tokenizers.Tokenizer:
        inner = make()
        inner.model.unk_token = "Z"
        return inner

    return made


def cleaned() -> tokenizers.Tokenizer:
    """As T5 and XLM-R have it, with a normalizer that may do anything."""
    inner = KINDS["unigram"]()
    spaces: Any = normalizers.Replace(Regex(" {2,}"), " ")
    inner.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    return inner


WINDOWED = {
    **MAKERS, "never": with_unknown(never), "cleaned": cleaned,
}  # fmt: skip


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run of one character is longer than a window, and something stands before each text."""
    monkeypatch.setattr(windows, "WINDOW", 400)
    monkeypatch.setattr(windows, "OVERLAP", 200)
    tokenizer = Tokenizer(WINDOWED[kind](), EOS)
    assert tokenizer._has_places
    draw = random.Random(kind)
    for run in ("a", "9", "é", " ", "\ufffd", ""):
        parts = ["".join(draw.choices(ODD, k=200)) for _ in range(2)]
        text = (run * 900).join(parts)
        whole = tokenizer.inner.encode(text, add_special_tokens=False)
        found = list(windows.encode_in_windows(text, tokenizer._placed))
        assert len(found) > 1 or run  # a long word that is one token is not divided
        assert np.concatenate([ids for ids, _ in found]).tolist() == whole.ids
        assert np.concatenate([ends for _, ends in found]).tolist() == [end for _, end in whole.offsets]


def test_what_is_left_out_has_no_place() -> None:
    assert not Tokenizer(never(), EOS)._has_places


def test_parts_are_the_text() -> None:
    text = "one two three four"
    assert list(parts_of(text, text_division.BEFORE_SPACE, 5)) == ["one two", " three", " four"]
    assert list(parts_of("one", text_division.BEFORE_SPACE, 1)) == ["one"]


PROGRAM = """
import random, resource, sys
from tokenizers import normalizers
from p828.config import TokenizerConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), ["a word", "12"])
if sys.argv[1] == "windows":
    tokenizer.inner.normalizer = normalizers.Prepend("+")
    tokenizer = Tokenizer(tokenizer.inner, "<|endoftext|>")
draw = random.Random(0)
text = chr(10).join("%x" % draw.getrandbits(64) for _ in range(int(sys.argv[2])))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids, = tokenizer.encode_documents([text])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(text))
"""


@pytest.mark.parametrize("way, lines", [("borders", 250_000), ("windows", 80_000)])
def test_a_large_document_takes_bounded_memory(way: str, lines: int) -> None:
    """Hexadecimal lines, about a token a character: of each 8 bytes twice are left, and 16 while joining.

    The whole at once takes over 300 bytes a character.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM, way, str(lines)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
