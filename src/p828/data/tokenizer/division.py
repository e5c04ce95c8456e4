"""Where a long text may be divided, so that its parts become the tokens that the whole becomes.

It may be where the pre-tokenizer ends a piece by itself, whatever comes before or after. That is known here of the
pre-tokenizers in wide use, and of BPE without one where no token goes on there. With any other see `windows`.
"""

import re
from collections.abc import Iterator
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# cl100k_base's pattern (tiktoken) with single digits: a word takes the space or the sign before it, a run of
# indentation is one piece but for the space that belongs to the next word, signs take the newlines behind them.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # Llama 3 has it, too
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
# These patterns look at nothing before a piece, and every piece of theirs ends where a letter or a digit comes before
# another kind of character. Only ASCII is looked at, which no normalizer joins with its neighbour.
KNOWN_PATTERNS = {PIECES, GPT2, CL100K, QWEN2}
BORDER = re.compile(r"[A-Za-z](?=[\x00-&(-@\[-`{-\x7f])|[0-9](?=[\x00-/:-\x7f])")
BEFORE_SPACE = re.compile(r"[A-Za-z0-9](?= )")
BEFORE_BLANK = re.compile(r"[A-Za-z0-9](?=[ \n])")
# Normalizers that make of a text what they make of its parts, end to end, where a part begins with ASCII.
PART_BY_PART = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer", "StripAccents"}
ONE_CHARACTER_EACH = {"Digits", "Punctuation"}  # pre-tokenizers that divide by what a character is
SPACE, METASPACE = " ", "▁"  # the second is what the first becomes in some vocabularies


def borders(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Where text may be divided, behind each match, with the tokenizer of this tokenizer.json; None if nowhere."""
    space = _normalized_space(spec["normalizer"])
    if not space:
        return None
    if spec["pre_tokenizer"] is None:
        found = BEFORE_SPACE if _merges_end_before(space, spec["model"]) else None
    else:
        found = _ends_of_pieces(spec["pre_tokenizer"], space)
    return None if found is None or _may_cross(spec["added_tokens"], found) else found


def has_places(spec: dict[str, Any]) -> bool:
    """Whether the library tells where each token stands, with the tokenizer of this tokenizer.json.

    A BPE without a token for what it does not know leaves that out, and counts the places within a piece without it.
    """
    model = spec["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None:
        return True
    spelled = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else ByteLevel.alphabet()
    return (model.get("byte_fallback") or _is_byte_level(spec["pre_tokenizer"])) and model["vocab"].keys() >= {*spelled}


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return any(part is not None and part["type"] == "ByteLevel" for part in parts)


def parts_of(text: str, where: re.Pattern[str], size: int) -> Iterator[str]:
    """The text in parts of at least `size` characters, but for the last one."""
    start = 0
    while found := where.search(text, start + size - 1):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _normalized_space(normalizer: dict[str, Any] | None) -> str:
    """What a space becomes; empty if the normalizer may see more than a part."""
    space = SPACE
    parts = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        parts = normalizer["normalizers"]
    for part in parts:
        if part["type"] == "Replace" and part["pattern"] == {"String": SPACE} and part["content"] == METASPACE:
            space = METASPACE
        elif part["type"] not in PART_BY_PART:
            return ""
    return space


def _merges_end_before(space: str, model: dict[str, Any]) -> bool:
    """Whether no token of a BPE has a space behind a letter or digit: then no merge goes across the two."""
    if model["type"] != "BPE" or model.get("ignore_merges") or space not in model["vocab"]:
        return False
    inside = re.compile(rf"[A-Za-z0-9]{space}")
    return not any(map(inside.search, model["vocab"]))


def _ends_of_pieces(pre_tokenizer: dict[str, Any], space: str) -> re.Pattern[str] | None:
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    nothing: dict[str, Any] = {"type": ""}
    first = next((part for part in parts if part["type"] not in ONE_CHARACTER_EACH), nothing)
    if first["type"] == "Metaspace":
        is_divided = first["replacement"] == METASPACE and first.get("split", True)
        return BEFORE_SPACE if is_divided else None
    if first["type"] == "Split" and "String" in first["pattern"]:
        is_divided = first["behavior"] in ("Isolated", "MergedWithNext") and not first["invert"]
        return BEFORE_SPACE if is_divided and first["pattern"]["String"] == space else None
    if space != SPACE:
        return None
    if first["type"] in ("WhitespaceSplit", "Whitespace", "BertPreTokenizer"):
        return BEFORE_BLANK
    if first["type"] == "ByteLevel" and first.get("use_regex", True):
        return BEFORE_SPACE if first["add_prefix_space"] else BORDER
    if first["type"] == "Split" and (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True)):
        return BORDER if first["pattern"].get("Regex") in KNOWN_PATTERNS else None
    return None


def _may_cross(added: list[dict[str, Any]], where: re.Pattern[str]) -> bool:
    """Whether an added token, which is found in the text before it is divided into pieces, may lie on a border."""
    ordinary = [token for token in added if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in ordinary):
        return True
    characters = {character for token in ordinary for character in _with_spaces(token)}
    # A special token is not looked for, but where text spells one, none is found that overlaps with it.
    overlapping = [token for token in added if token["special"] and not characters.isdisjoint(_with_spaces(token))]
    return any(where.search(_with_spaces(token)) for token in (*ordinary, *overlapping))


def _with_spaces(token: dict[str, Any]) -> str:
    content: str = token["content"]
    return content.replace(METASPACE, SPACE)
