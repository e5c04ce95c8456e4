import hashlib
import json
import random
import signal
import string
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from data_samples import text
from tokenizers import Regex, models, pre_tokenizers, trainers

from p828.config import TokenizerConfig
from p828.data.tokenizer.division import PIECES
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.errors import ConfigError

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


def test_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert tokenizer.eos_id == 0
    for sample, ids in zip(SAMPLES, tokenizer.encode_documents(SAMPLES), strict=True):
        assert ids.dtype == np.int64
        assert ids.tolist() == [*tokenizer.encode(sample), tokenizer.eos_id]
        assert tokenizer.eos_id not in ids[:-1]
        assert tokenizer.decode(ids) == sample


def test_pieces_suit_code(tokenizer: Tokenizer) -> None:
    code = "if a:\n        return x12\n"
    assert [piece for piece, _ in tokenizer.inner.pre_tokenizer.pre_tokenize_str(code)] == [
        "if", "Ġa", ":Ċ", "ĠĠĠĠĠĠĠ", "Ġreturn", "Ġx", "1", "2", "Ċ",
    ]  # fmt: skip


def test_training_is_deterministic(tmp_path: Path) -> None:
    """In another process too, as hash maps are seeded per process."""
    texts = [text(i) for i in range(100)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys; from p828.config import TokenizerConfig\n"
        "from p828.data.tokenizer.training import train_tokenizer\n"
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

    with pytest.raises(ConfigError, match=r"vocabulary of 320 exceeds model\.vocab_size = 319"):
        load(model_vocab_size=319)
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token = '<eos>': not in the tokenizer's vocabulary"):
        load(eos_token="<eos>")
    with pytest.raises(ConfigError, match=r"missing\.json: cannot be read as a tokenizer\.json: .*No such file"):
        load(name=str(tmp_path / "missing.json"))
    given.write_text('{"not": "a tokenizer"}')
    with pytest.raises(ConfigError, match=r"given\.json: not a tokenizer\.json"):
        load()
    given.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"given\.json: cannot be read"):
        load()
    assert not saved.parent.exists()
    with pytest.raises(ConfigError, match="vocabulary of 257 exceeds"):
        load(name="train", vocab_size=257, model_vocab_size=256)
    assert not saved.parent.exists()


def test_a_file_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written"):
        tokenizer.save(tmp_path / "file" / "tokenizer.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match=r"taken: cannot be written"):
        tokenizer.save(tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def untouched_training(config: TokenizerConfig, texts: list[str]) -> dict[str, Any]:
    """What the library makes of whole pieces, however long."""
    inner = tokenizers.Tokenizer(models.BPE())
    split: Any = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[config.eos_token], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(inner.to_str())["model"]
    return model


def test_long_pieces_are_cut_and_no_others() -> None:
    """Of ordinary text, and of words of up to 256 characters, the tokenizer is the one that the library makes."""
    config = TokenizerConfig(vocab_size=600)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=length)) for length in (255, 200, 100, 30)]
    texts = [text(i) for i in range(100)] + [" ".join(words)] * 3 + ["-" * 256, "\n" * 256, "x" + " " * 256]
    made = train_tokenizer(config, texts)
    assert json.loads(made.inner.to_str())["model"] == untouched_training(config, texts)
    # In longer ones no token reaches over a place where they are cut.
    longer = train_tokenizer(config, ["a" * 255 + "b" + "c" * 256])
    assert "bc" not in longer.inner.get_vocab()
    assert "ab" in longer.inner.get_vocab()


@pytest.mark.parametrize("character", ["a", "\n", " ", "=", "\u0301", "数", "1"])
def test_a_text_of_one_character(character: str) -> None:
    """As one piece it takes minutes."""
    sample = character * 300_000
    made = train_tokenizer(TokenizerConfig(vocab_size=1000), [sample])
    assert made.decode(made.encode(sample)) == sample


def test_one_document_of_letters() -> None:
    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=300_000))
    made = train_tokenizer(TokenizerConfig(vocab_size=1000), [letters])
    assert made.vocab_size == 1000
    assert made.decode(made.encode(letters)) == letters


@pytest.mark.parametrize("moment", ["reading", "training"])
def test_a_signal_ends_the_training_of_a_tokenizer(moment: str) -> None:
    """While it takes texts, and while the library is at work on them, which takes half a minute."""
    program = (
        "import random, sys\n"
        "from p828.config import TokenizerConfig\n"
        "from p828.data.tokenizer.training import train_tokenizer\n"
        "def documents():\n"
        "    for i in range(60):\n"
        "        yield ''.join(random.choices('abcdefghijklm nop', k=100_000))\n"
        f"        if i == 3 and {moment == 'reading'}: print('now', flush=True)\n"
        f"    if {moment == 'training'}: print('now', flush=True)\n"
        "train_tokenizer(TokenizerConfig(vocab_size=60_000), documents())\n"
        "print('trained')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert err.endswith("KeyboardInterrupt\n")
    assert process.returncode == -signal.SIGINT
    assert out == ""


def test_what_reading_raises_comes_out_of_training() -> None:
    def documents() -> Iterable[str]:
        yield "text"
        raise ConfigError("line 2 is no JSON")

    with pytest.raises(ConfigError, match="line 2 is no JSON"):
        train_tokenizer(TokenizerConfig(vocab_size=300), documents())
