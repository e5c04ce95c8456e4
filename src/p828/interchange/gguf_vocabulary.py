"""A byte-level BPE tokenizer as llama.cpp's files hold it: tokens, their types, merges, and a pre-tokenizer's name.

llama.cpp has no patterns of a file's own but a list of names, each with a splitting function inside it.
"""

import json
from dataclasses import dataclass
from typing import Any

from p828.data.tokenizer.division import CL100K, GPT2, PIECES, QWEN2
from p828.data.tokenizer.special_tokens import made_by_model
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError

# Pattern, and whether a piece that is a token stays whole (`ignore_merges`): llama.cpp's name. It knows the
# characters of Unicode 15.1; text with newer letters may become other tokens there, and so may 'ſ.
PRE_TOKENIZERS = {
    (PIECES, False): "qwen2",
    (QWEN2, False): "qwen2",
    (GPT2, False): "gpt-2",
    (CL100K, False): "dbrx",
    (CL100K, True): "llama-bpe",
}
MODEL_DEFAULTS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
STRIPPING = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    """By id, as the tokenizer spells them; an id without a token has a name that no text becomes."""
    types: list[int]
    """By id: `gguf.TokenType`."""
    merges: list[str]
    """First ones first, the two parts with a space between them."""
    pre_tokenizer: str
    """llama.cpp's name."""


def vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary with as many entries as the model has rows.

    Raises ConfigError where llama.cpp would make other tokens of text.
    """
    from gguf import TokenType

    spec = json.loads(tokenizer.to_json())
    obstacles = _obstacles(spec, tokenizer)
    if obstacles:
        raise ConfigError(
            f"tokenizer: llama.cpp does not have it: {', '.join(obstacles)}\n"
            "Accepted is byte-level BPE as p828 trains it, or with the pattern of GPT-2, Llama 3 or Qwen 2"
        )
    tokens = [f"<unused {number}>" for number in range(rows)]  # a space is in no token of a byte-level vocabulary
    types = [int(TokenType.UNUSED)] * rows
    for token, number in spec["model"]["vocab"].items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    types[tokenizer.eos_id] = int(TokenType.CONTROL)  # in some files it is among the ordinary tokens
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return Vocabulary(tokens, types, merges, PRE_TOKENIZERS[_pattern(spec), _keeps_tokens(spec)])


def _obstacles(spec: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    model, added = spec["model"], spec["added_tokens"]
    if model["type"] != "BPE":
        return [f"a {model['type']} model"]
    special = {str(token["content"]) for token in added if token["special"]}
    ordinary = [token for token in added if not token["special"]]
    found = {
        "a pre-tokenizer with another pattern": (_pattern(spec), _keeps_tokens(spec)) not in PRE_TOKENIZERS,
        f"a normalizer ({(spec['normalizer'] or {}).get('type')})": spec["normalizer"] is not None,
        "special tokens that text becomes": bool(made_by_model(model, special)),
        "added tokens that take spaces or whole words": any(token[key] for token in ordinary for key in STRIPPING),
        **{f"{key} = {model.get(key)!r}": bool(model.get(key)) for key in MODEL_DEFAULTS},
    }
    return [words for words, is_there in found.items() if is_there]


def _keeps_tokens(spec: dict[str, Any]) -> bool:
    return bool(spec["model"].get("ignore_merges"))


def _pattern(spec: dict[str, Any]) -> str:
    """The regular expression that divides text before its bytes are spelled; empty if that is done in another way."""
    pre_tokenizer = spec["pre_tokenizer"] or {"type": ""}
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return ""
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return GPT2
    if len(parts) != 2 or parts[0]["type"] != "Split" or parts[1].get("use_regex", True):
        return ""
    is_plain = (parts[0]["behavior"], parts[0]["invert"]) in (("Isolated", False), ("Removed", True))
    return str(parts[0]["pattern"].get("Regex", "")) if is_plain else ""
