import itertools
import random
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.generate import TextStream
from tokenizer_kinds import EOS, KINDS, SPECIAL

TEXT = "The cat 🙂 said naïve things: é, 漢字, 👩‍🚀!\n"


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces of text, the last one from `finish`, and whether a stop string ended it."""
    text_stream = TextStream(tokenizer, tokenizer.encode("the "), stop)
    pieces = []
    for token in ids:
        pieces.append(text_stream.push(token))
        if text_stream.stopped:
            break
    return [*pieces, text_stream.finish()], text_stream.stopped


def test_characters_split_over_tokens_come_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT)
    assert len(byte_level.encode("🙂")) == 4
    pieces, _ = stream(byte_level, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    # Text comes with the token that completes it, not later.
    for n in range(1, len(ids) + 1):
        assert "".join(pieces[:n]) == byte_level.decode(ids[:n]).rstrip("\ufffd")


def test_a_character_cut_off_at_the_end_is_left_out(byte_level: Tokenizer) -> None:
    pieces, _ = stream(byte_level, byte_level.encode("cat🙂")[:-1])
    assert "".join(pieces) == "cat"


def test_bytes_that_are_no_text_do_not_stop_the_stream(byte_level: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(byte_level.vocab_size) for _ in range(30)] + byte_level.encode("cat")
        pieces, _ = stream(byte_level, ids)
        assert "".join(pieces) == byte_level.decode(ids)


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("said",), "The cat 🙂 "),
        (("🙂 s",), "The cat "),
        (("\n",), TEXT[:-1]),
        (("zzz", "cat"), "The "),
        (("hat", "things:", "at 🙂 said n"), "The c"),
        (("The",), ""),
        (("!\n\n", "dog"), TEXT),
        (("at 🙂 said nothing", "said"), "The cat 🙂 "),
        (("cat 🙂 said", "at"), "The c"),  # complete first, though the other begins first
    ],
)
def test_stop_strings_span_tokens(
    byte_level: Tokenizer, letters: Tokenizer, stop: tuple[str, ...], expected: str
) -> None:
    pieces, stopped = stream(byte_level, byte_level.encode(TEXT), stop)
    assert "".join(pieces) == expected
    assert stopped == (expected != TEXT)


def test_what_may_become_a_stop_string_is_held_back(letters: Tokenizer) -> None:
    pieces, _ = stream(letters, letters.encode("ababcx"), ("abc",))
    assert pieces == ["", "", "ab", "", "", ""]
    pieces, _ = stream(letters, letters.encode("ababdx"), ("abc",))
    assert pieces == ["", "", "ab", "", "abd", "x", ""]
    pieces, _ = stream(letters, letters.encode("xab"), ("abc",))
    assert pieces == ["x", "", "", "ab"]


def test_stop_strings_are_found_as_if_character_by_character(byte_level: Tokenizer, letters: Tokenizer) -> None:
    """Also when one token completes several of them."""
    text = " the cat the"
    assert len(byte_level.encode(text)) < len(text) / 2
    parts = [text[i:j] for i in range(9) for j in range(i + 1, 9)]
    for stop in itertools.permutations(parts, 2):
        in_tokens, in_letters = (stream(t, t.encode(text), stop) for t in (byte_level, letters))
        assert "".join(in_tokens[0]) == "".join(in_letters[0]), stop


def test_spaces_survive_a_tokenizer_that_drops_the_first_one() -> None:
    """A word-piece vocabulary decodes `▁cat` alone to `cat`."""
    inner = tokenizers.Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "▁sat": 2, "<eos>": 3}, unk_token="<eos>"))
    pre_tokenizer: Any = pre_tokenizers.Metaspace()
    decoder: Any = decoders.Metaspace()
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoder
    pieces, _ = stream(Tokenizer(inner, "<eos>"), [1, 2, 1])
    assert pieces == [" cat", " sat", " cat", ""]


def test_stop_strings_against_a_search_of_the_whole_text(letters: Tokenizer) -> None:
    """All texts of 7 letters a and b, with overlapping stop strings."""
    for stop in (("aab",), ("abab", "bb"), ("ba", "aaa", "abb")):
        for letter_tuple in itertools.product("ab", repeat=7):
            text = "".join(letter_tuple)
            ends = [n for n in range(8) if text[:n].endswith(stop)]
            expected = text
            if ends:
                longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
                expected = text[: ends[0] - longest]
            pieces, stopped = stream(letters, letters.encode(text), stop)
            assert ("".join(pieces), stopped) == (expected, bool(ends)), (text, stop)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_what_decoding_gives(kind: str) -> None:
    """With special tokens anywhere, bytes that are no text, and prompts of all lengths."""
    tokenizer = Tokenizer(KINDS[kind](), EOS)
    draw = random.Random(0)
    special = [tokenizer.inner.token_to_id(token) or tokenizer.eos_id for token in SPECIAL]
    words = tokenizer.encode("The cat and the dog sat on the mat")
    compared = 0
    for number in range(150):
        any_token = range(tokenizer.vocab_size) if number % 2 else words
        prompt = [draw.choice([*any_token, *special]) for _ in range(draw.randrange(4))] or [tokenizer.eos_id]
        ids = [draw.choice([draw.choice(any_token), draw.choice(special)]) for _ in range(25)] + words
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
        text_stream = TextStream(tokenizer, prompt, ())
        text = "".join(text_stream.push(token) for token in ids) + text_stream.finish()
        if whole.startswith(before):  # else bytes of the prompt were no text yet
            assert text == whole[len(before) :]
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "end_of_word"])
@pytest.mark.parametrize("text", ["\ufffd", "the cat\ufffd", "the \ufffd\ufffd", "\ufffd cat \ufffd"])
def test_a_replacement_character_that_the_text_has_is_kept(kind: str, text: str) -> None:
    tokenizer = Tokenizer(KINDS[kind](), EOS)
    ids = tokenizer.encode(text)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces).strip() == tokenizer.decode(ids).strip()
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_character_that_is_cut_off_behind_one_is_left_out() -> None:
    """Also where the vocabulary has it as bytes, which the library decodes all together or not at all."""
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = Tokenizer(KINDS[kind](), EOS)
        ids = tokenizer.encode("cat 龘龘")
        for dropped in (1, 2):
            pieces, _ = stream(tokenizer, ids[:-dropped])
            assert "".join(pieces).strip() == "cat 龘"


def test_text_in_the_token_of_a_cut_off_character_stays() -> None:
    """A token may be a space, or letters, with the first bytes of the next character behind them."""
    first_byte = "Ã"  # as byte-level vocabularies spell 0xC3
    inner = tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 1, "na" + first_byte: 2, "Ġ" + first_byte: 3}, []))
    decoder: Any = decoders.ByteLevel()
    inner.decoder = decoder
    tokenizer = Tokenizer(inner, "<eos>")
    for last, text in ((2, "ana"), (3, "a ")):
        text_stream = TextStream(tokenizer, [0], ())
        assert "".join(map(text_stream.push, [1, last])) + text_stream.finish() == text
