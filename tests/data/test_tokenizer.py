import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data_samples import text
from tokenizers import decoders, models, normalizers, pre_tokenizers

from p828.config import TokenizerConfig
from p828.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from p828.errors import UserError

SAMPLES = [
    "",
    "plain words",
    "def f(x):\n    if x:\n\treturn 1234567\n\n\n",
    "naïve 数据 🙂 \u2028 \r\n  end ",
    "<|endoftext|> is text here",
    "\x00\x01",
]


def never() -> Iterable[str]:
    raise AssertionError("no text is needed")


def test_round_trip_and_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert tokenizer.eos_id == 0
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.shape == (320,)
    assert token_bytes.dtype == np.int64
    assert token_bytes[tokenizer.eos_id] == 0
    for sample, ids in zip(SAMPLES, tokenizer.encode_documents(SAMPLES), strict=True):
        assert ids.dtype == np.int64
        assert ids.tolist() == [*tokenizer.encode(sample), tokenizer.eos_id]
        assert tokenizer.eos_id not in ids[:-1]
        assert tokenizer.decode(ids) == sample
        assert token_bytes[ids].sum() == len(sample.encode())


def test_pieces_suit_code(tokenizer: Tokenizer) -> None:
    code = "if a:\n        return x12\n"
    assert [piece for piece, _ in tokenizer.inner.pre_tokenizer.pre_tokenize_str(code)] == [
        "if", "Ġa", ":Ċ", "ĠĠĠĠĠĠĠ", "Ġreturn", "Ġx", "1", "2", "Ċ",
    ]  # fmt: skip


def test_bytes_of_a_vocabulary_that_is_not_byte_level() -> None:
    vocab = {"<eos>": 0, "▁ä": 1, "b": 2, "<0x0A>": 3, "<gap>": 7}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<eos>"])
    inner.add_tokens(["<gap>"])
    made = Tokenizer(inner, "<eos>")
    assert made.vocab_size == 8
    assert made.token_bytes().tolist() == [0, 3, 1, 1, 0, 0, 0, 5]


def test_training_is_deterministic(tmp_path: Path) -> None:
    """In another process too, as hash maps are seeded per process."""
    texts = [text(i) for i in range(100)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys; from p828.config import TokenizerConfig; from p828.data.tokenizer import train_tokenizer\n"
        "texts = json.load(open(sys.argv[1] + '/texts.json'))\n"
        "train_tokenizer(TokenizerConfig(vocab_size=500), texts).save(sys.argv[1] + '/other.json')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    for name in ("one.json", "two.json"):
        train_tokenizer(TokenizerConfig(vocab_size=500), texts).save(tmp_path / name)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*o*.json")}
    assert len(digests) == 1


def test_training_reads_no_more_than_asked() -> None:
    read = []

    def documents() -> Iterable[str]:
        for i in range(10):
            read.append(i)
            yield "word" * 100_000

    train_tokenizer(TokenizerConfig(vocab_size=257, training_megabytes=1), documents())
    assert read == [0, 1, 2]  # 400,000 bytes each


def test_a_saved_tokenizer_is_used_again(tmp_path: Path) -> None:
    saved = tmp_path / "run" / "tokenizer.json"
    config = TokenizerConfig(vocab_size=300)
    made = load_tokenizer(config, lambda: [text(i) for i in range(50)], 300, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["tokenizer.json"]
    again = load_tokenizer(config, never, 300, saved)
    assert again.fingerprint() == made.fingerprint()
    assert again.encode(SAMPLES[3]) == made.encode(SAMPLES[3])
    assert again.encode(SAMPLES[4]) == made.encode(SAMPLES[4])


@pytest.mark.parametrize("name", ["given.json", "."])
def test_a_given_file_is_copied_into_the_run(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    tokenizer.save(tmp_path / "given.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = tmp_path / "run" / "tokenizer.json"
    loaded = load_tokenizer(TokenizerConfig(name=str(tmp_path / name)), never, 320, saved)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.from_file(saved, "<|endoftext|>").fingerprint() == tokenizer.fingerprint()


def test_truncation_and_padding_of_a_file_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=5)
    inner.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.from_file(tmp_path / "t.json", "<|endoftext|>")
    assert loaded.encode(SAMPLES[2]) == tokenizer.encode(SAMPLES[2])


def test_what_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved = tmp_path / "run" / "tokenizer.json"
    given = tmp_path / "given.json"
    tokenizer.save(given)

    def load(model_vocab_size: int = 320, **fields: object) -> None:
        config = TokenizerConfig(**{"name": str(given), **fields})  # type: ignore[arg-type]
        load_tokenizer(config, lambda: ["some text"], model_vocab_size, saved)

    with pytest.raises(UserError, match=r"vocabulary of 320 exceeds model\.vocab_size = 319"):
        load(model_vocab_size=319)
    with pytest.raises(UserError, match=r"tokenizer\.eos_token = '<eos>': not in the tokenizer's vocabulary"):
        load(eos_token="<eos>")
    with pytest.raises(UserError, match=r"missing\.json: cannot be read as a tokenizer\.json: .*No such file"):
        load(name=str(tmp_path / "missing.json"))
    given.write_text('{"not": "a tokenizer"}')
    with pytest.raises(UserError, match=r"given\.json: not a tokenizer\.json"):
        load()
    given.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"given\.json: cannot be read"):
        load()
    assert not saved.parent.exists()
    with pytest.raises(UserError, match="vocabulary of 257 exceeds"):
        load(name="train", vocab_size=257, model_vocab_size=256)
    assert not saved.parent.exists()


def test_a_file_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        tokenizer.save(tmp_path / "file" / "tokenizer.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"taken: cannot be written"):
        tokenizer.save(tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
