"""What holds for every kind of tokenizer: bytes, special tokens, what comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from p828.config import DataConfig, TokenizerConfig, ValidationConfig
from p828.data.build import validation_batches
from p828.data.tokenizer.of_run import load_tokenizer, lost_fraction, remarks
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from tokenizer_kinds import EOS, KINDS, SPECIAL

HOSTILE = [
    "The  cat</s> said\n\n        don't <s>x</s></s> </s>\tÅ🙂龘 <unk>\n " + " " * 30 + "end \ufffd",
    EOS,
    f"{EOS}{EOS}",
    f"the cat {EOS} sat",
    f"cat{EOS}the cat",
    "▁▁the▁cat",
    "naïve cafe\u0301 ﬁ Å 数据",
    "",
    " ",
    "\n\n",
    "\0\x07",
]
KNOWN = "The cat and the dog sat"


@pytest.fixture(params=KINDS)
def inner(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return KINDS[request.param]()


def test_no_text_becomes_a_special_token(inner: tokenizers.Tokenizer) -> None:
    plain = inner.encode(KNOWN, add_special_tokens=False).ids
    assert inner.token_to_id(EOS) in inner.encode(HOSTILE[3], add_special_tokens=False).ids, "what the library does"
    made = Tokenizer(inner, EOS)
    special = {inner.token_to_id(token) for token in SPECIAL} - {inner.token_to_id("<unk>")}
    for sample, ids in zip(HOSTILE, made.encode_documents(HOSTILE), strict=True):
        assert not special & set(ids[:-1].tolist()), sample
        assert ids[-1] == made.eos_id
        assert ids[:-1].tolist() == made.encode(sample)
    assert made.encode(KNOWN) == plain, "other text is tokenized as before"


def test_bytes_are_those_of_the_text(inner: tokenizers.Tokenizer) -> None:
    made = Tokenizer(inner, EOS)
    plain = made.encode_documents(HOSTILE)
    for sample, expected, (ids, counts) in zip(HOSTILE, plain, made.encode_counted(HOSTILE), strict=True):
        assert ids.tolist() == expected.tolist()
        assert counts.shape == ids.shape
        assert counts.sum() == len(sample.encode())
        assert (counts >= 0).all()
        assert counts[-1] == 0 or len(ids) == 1


def test_bytes_stand_where_their_text_does() -> None:
    """With a token a character, each has its own bytes."""
    made = Tokenizer(KINDS["word_level"](), EOS)
    text = "The  cat é sat"
    (_, counts), = made.encode_counted([text])  # fmt: skip
    assert counts.tolist() == [3, 5, 3, 4, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_counts_every_byte_once(tmp_path: Path, kind: str) -> None:
    """Whole documents in rows that cut them anywhere, but for each row's first token, which is no target."""
    texts = [*HOSTILE[:7], KNOWN * 5]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    validation = ValidationConfig(kind="files", files=(str(tmp_path / "a.jsonl"),))
    made = Tokenizer(KINDS[kind](), EOS)
    counted = made.encode_counted(texts)
    of_all = np.concatenate([counts for _, counts in counted])
    for length in (7, 16, 1000):
        config = DataConfig(sequence_length=length, validation=validation)
        batches = validation_batches(config, made, True, 1000, 3)
        assert sum(batch.text_bytes for batch in batches) == of_all.sum() - of_all[:: length + 1].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_what_is_decoded(kind: str) -> None:
    """Without the text, as of prepared data: the sums are those of the text that comes back."""
    made = Tokenizer(KINDS[kind](), EOS)
    texts = ["the cat and the dog", "return 12", "sat on the mat " + " " * 20 + "The fox 数据 🙂"]
    documents = made.encode_documents(texts)
    back = [made.decode(ids) for ids in documents]
    tokens = np.concatenate(documents)
    numbers = np.repeat(np.arange(3, dtype=np.int32), [len(ids) for ids in documents])
    assert made.spelled_bytes(tokens, numbers).sum() == sum(len(text.encode()) for text in back)
    # Of a row that begins within a document.
    counts = made.spelled_bytes(tokens[1:], numbers[1:])
    expected = sum(len(text.encode()) for text in back) - len(made.decode(documents[0][:2]).encode())
    assert abs(counts[1:].sum() - expected) <= (kind == "word_piece")  # the space behind a first word that is unknown


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_come_back_is_reported(kind: str) -> None:
    made = Tokenizer(KINDS[kind](), EOS)
    text = "The cat said: naïve 龘\n  AND\tsat.\n"
    fraction = lost_fraction(made, [text])
    assert (fraction == 0) == (made.decode(made.encode(text)) == text)
    assert (fraction == 0) == (kind in ("byte_level", "byte_fallback"))
    lines = remarks(TokenizerConfig(name="t.json"), made, [text])
    assert lines == [] if fraction == 0 else f"{fraction:.1%} of the text does not come back" in lines[0]


def test_the_fraction_that_is_lost() -> None:
    made = Tokenizer(KINDS["word_level"](), EOS)
    assert lost_fraction(made, ["the unheard cat\n"]) == len("unheard \n") / len("the unheard cat\n")
    assert lost_fraction(made, []) == 0


def test_dropout_is_not_done(tmp_path: Path) -> None:
    spec = json.loads(KINDS["byte_level"]().to_str())
    spec["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(spec))
    saved = tmp_path / "run" / "tokenizer.json"
    config = TokenizerConfig(name=str(tmp_path / "t.json"), eos_token=EOS)
    for made in (load_tokenizer(config, list, 0, saved), Tokenizer.from_file(saved, EOS)):
        assert len({tuple(made.encode("the cat and the dog said")) for _ in range(20)}) == 1
        (line,) = remarks(config, made, ["the cat"])
        assert "dropout of 0.5 is switched off" in line


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_given(tmp_path: Path, kind: str) -> None:
    inner = KINDS[kind]()
    given = json.loads(inner.to_str())
    made = Tokenizer(inner, EOS)
    made.save(tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text())
    if kind == "unigram":  # its scores are rounded when they are read
        assert [piece for piece, _ in saved["model"]["vocab"]] == [piece for piece, _ in given["model"]["vocab"]]
        given["model"]["vocab"] = saved["model"]["vocab"]
    assert saved == given
    again = Tokenizer.from_file(tmp_path / "t.json", EOS)
    assert again.fingerprint() == made.fingerprint()
    assert again.encode_documents(HOSTILE)[0].tolist() == made.encode_documents(HOSTILE)[0].tolist()


@pytest.mark.parametrize(
    "kind, eos_token",
    [
        ("word_level", "the"),
        ("word_piece", "the"),
        ("end_of_word", "the</w>"),
        ("unigram", "on"),
        ("byte_level", "Ġthe"),
        ("byte_level", "  "),
        ("byte_level", "e"),
        ("byte_level", ""),
        ("byte_fallback", "<0x0A>"),
        ("byte_fallback", "▁▁"),
        ("word_level", "<unk>"),
    ],
)
def test_an_end_token_that_text_becomes_is_refused(tmp_path: Path, kind: str, eos_token: str) -> None:
    KINDS[kind]().save(str(tmp_path / "t.json"))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.eos_token = .*: (ordinary text|text becomes|at least|a token of)"
    ):
        Tokenizer.tried(tmp_path / "t.json", eos_token)


def test_an_end_token_that_only_the_model_knows() -> None:
    """As in vocabularies of sentencepiece: it is made a special one."""
    pieces = [("<unk>", 0.0), (EOS, 0.0), *((character, -2.0) for character in "▁abc</s>")]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    made = Tokenizer(inner, EOS)
    ids = made.encode(f"a{EOS} b")
    assert made.eos_id not in ids
    assert [inner.id_to_token(i) for i in ids] == ["▁", "a", "<", "/", "s", ">", "▁", "b"]
    assert "s>" not in made.decode([*made.encode("ab"), made.eos_id])
