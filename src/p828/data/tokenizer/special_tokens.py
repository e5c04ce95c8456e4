"""Special tokens, which no text becomes: a document that spells one gets other tokens for it."""

import re
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

from p828.errors import ConfigError

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # what an unknown character's bytes become in some vocabularies
SHORTEST = 2  # characters of an end token: where text spells it, it can be divided
MOST_SHOWN = 5


def settle_end_token(inner: tokenizers.Tokenizer, spec: dict[str, Any], eos_token: str) -> int:
    """The end token's id; made special if it is not. `spec` is the tokenizer's own JSON.

    Raises ConfigError when it is not in the vocabulary, or is there as what ordinary text becomes.
    """
    given = f"tokenizer.eos_token = {eos_token!r}"
    if len(eos_token) < SHORTEST:
        raise ConfigError(
            f"{given}: a token of at least {SHORTEST} characters is accepted, one that text does not become"
        )
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    known = f"; its special tokens: {', '.join(special[:MOST_SHOWN])}" if special else ""
    eos_id: int | None = inner.token_to_id(eos_token)
    if eos_id is None:
        raise ConfigError(f"{given}: not in the tokenizer's vocabulary{known}")
    if eos_token not in special:
        is_added = any(token["content"] == eos_token for token in spec["added_tokens"])
        # As vocabularies spell what is not text.
        is_marked = eos_token[0] in "<[" and eos_token[-1] in ">]" and not BYTE_TOKEN.fullmatch(eos_token)
        if not is_marked and (is_added or made_by_model(spec["model"], {eos_token})):
            raise ConfigError(f"{given}: ordinary text becomes this token; one that ends a document is accepted{known}")
        inner.add_special_tokens([eos_token])
    return eos_id


def keep_out_of_text(inner: tokenizers.Tokenizer, spec: dict[str, Any], eos_token: str) -> None:
    """Divide what spells a special token before the model sees it, if the model has a piece for the whole of it.

    The library then takes no special token out of text (`encode_special_tokens`), but a Unigram, word-level or
    WordPiece model, and some BPE models, find it in their own vocabulary.
    """
    inner.encode_special_tokens = True
    special = {token["content"] for token in spec["added_tokens"] if token["special"]} | {eos_token}
    rests: dict[str, list[str]] = {}
    for token in sorted(made_by_model(spec["model"], special)):
        if len(token) >= SHORTEST:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    if not rests:
        return
    # Behind its own pre-tokenizer, so that text without a special token is divided as before.
    firsts = "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    divide: Any = pre_tokenizers.Split(Regex(firsts), behavior="isolated")
    own: Any = inner.pre_tokenizer
    inner.pre_tokenizer = divide if own is None else pre_tokenizers.Sequence([own, divide])


def made_by_model(model: dict[str, Any], tokens: set[str]) -> set[str]:
    """The special tokens that `model`, as a tokenizer.json has it, would itself make of text that spells them."""
    if model["type"] == "Unigram":
        return tokens & {piece for piece, _ in model["vocab"]}
    found: set[str] = tokens & model["vocab"].keys()
    if model["type"] != "BPE" or model.get("ignore_merges") or not found:
        return found
    prefix = model.get("continuing_subword_prefix") or ""
    merged = {first + second.removeprefix(prefix) for first, second in model["merges"]}
    return {token for token in found if len(token) == 1 or token in merged or BYTE_TOKEN.fullmatch(token)}
