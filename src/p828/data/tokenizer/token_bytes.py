"""The bytes of a single token, also where it is a part of a character."""

from functools import cache

import tokenizers

from p828.data.tokenizer.special_tokens import BYTE_TOKEN


def bytes_of(inner: tokenizers.Tokenizer, token_id: int) -> bytes:
    """Of a byte-level token, whose name has a character a byte, and of `<0x0A>` these; of others their text's.

    A special token has none.
    """
    name = inner.id_to_token(token_id) or ""
    if BYTE_TOKEN.fullmatch(name):
        return bytes([int(name[3:5], 16)])
    text = inner.decode([token_id], skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" in text and all(character in byte_of_character() for character in name):
        return bytes(byte_of_character()[character] for character in name)
    return text.encode()


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: a printable byte is its own character, and the others are those from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
