"""Tokenizers of every kind in use, made on the spot from a little text."""

from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "</s>"
TRAINING_TEXT = [
    "The cat and the dog sat on the mat, and the naïve fox said: don't.\n",
    "def f(x):\n    if x:\n        return 12 * x\n",
    "Ångström units & 数据, 한국어 🙂 \ufffd <p>tags</p> [1]\n",
] * 5
SPECIAL = ["<unk>", "<s>", EOS]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-NeoX has it: normalised to NFC, and runs of spaces are added tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = _any(normalizers.NFC())
    inner.pre_tokenizer = _any(pre_tokenizers.ByteLevel(add_prefix_space=False))
    inner.decoder = _any(decoders.ByteLevel())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(inner, trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet))
    inner.add_tokens([AddedToken(" " * n, normalized=False) for n in range(24, 1, -1)])
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma have it: bytes for characters that it does not know, runs of ▁ are added tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = _any(normalizers.Replace(" ", "▁"))
    trained.pre_tokenizer = _any(pre_tokenizers.Split("▁", "merged_with_next"))
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(trained, trainers.BpeTrainer(vocab_size=340, special_tokens=tokens, limit_alphabet=50))
    merges = _merges(trained)
    inner = tokenizers.Tokenizer(models.BPE(trained.get_vocab(), merges, byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = _any(normalizers.Replace(" ", "▁"))
    replaced = decoders.Replace("▁", " ")
    inner.decoder = _any(decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse()]))
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens([AddedToken("▁" * n, normalized=True) for n in range(24, 1, -1)])
    return inner


def unigram() -> tokenizers.Tokenizer:
    """As T5 and XLNet have it: its own vocabulary holds the special tokens."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = _any(normalizers.NFKC())
    inner.pre_tokenizer = _any(pre_tokenizers.Metaspace())
    inner.decoder = _any(decoders.Metaspace())
    _train(inner, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    return inner


def word_piece() -> tokenizers.Tokenizer:
    """As BERT has it: lower case without accents, spaces and newlines are lost."""
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = _any(normalizers.BertNormalizer())
    inner.pre_tokenizer = _any(pre_tokenizers.WhitespaceSplit())
    inner.decoder = _any(decoders.WordPiece())
    _train(inner, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, limit_alphabet=30))
    return inner


def word_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = _any(pre_tokenizers.WhitespaceSplit())
    _train(inner, trainers.WordLevelTrainer(vocab_size=30, special_tokens=SPECIAL))
    return inner


def end_of_word() -> tokenizers.Tokenizer:
    """As GPT-1 and CLIP have it: the last token of a word says so."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = _any(pre_tokenizers.Whitespace())
    inner.decoder = _any(decoders.BPEDecoder(suffix="</w>"))
    _train(inner, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>"))
    return inner


def whole_words_first() -> tokenizers.Tokenizer:
    """As Llama 3 has it: a piece that is in the vocabulary is not merged together, even a special one."""
    made = byte_level()
    inner = tokenizers.Tokenizer(models.BPE(made.get_vocab(with_added_tokens=False), _merges(made), ignore_merges=True))
    inner.pre_tokenizer = _any(pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"))
    inner.pre_tokenizer = _any(
        pre_tokenizers.Sequence([inner.pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)])
    )
    inner.decoder = _any(decoders.ByteLevel())
    inner.add_special_tokens([AddedToken(EOS, lstrip=True, rstrip=True)])
    inner.add_tokens([AddedToken("cat", single_word=True, lstrip=True, rstrip=True)])
    return inner


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    make.__name__: make
    for make in (byte_level, byte_fallback, unigram, word_piece, word_level, end_of_word, whole_words_first)
}


def _train(inner: tokenizers.Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    inner.train_from_iterator(TRAINING_TEXT, trainer)


def _merges(inner: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    import json

    return [(first, second) for first, second in json.loads(inner.to_str())["model"]["merges"]]


def _any(part: Any) -> Any:
    """The library's stubs do not say that its parts can be set."""
    return part
