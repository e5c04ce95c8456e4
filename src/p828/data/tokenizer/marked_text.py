"""Marked text: a conversation as a chat template wrote it, and which of it is a control token or the assistant's.

`CONTROL` stands before each control token that the template wrote, so that the same characters in a message are text.
`BEGIN` and `END` enclose what the assistant said. All marks are Unicode noncharacters, which no text has: in messages
they are replaced by U+FFFD.
"""

import re
from collections.abc import Sequence
from typing import Any

CONTROL, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
QUOTE, UNQUOTE = "\ufdd3", "\ufdd4"  # around a control token's name in a message, while a template is rendered
MARK = re.compile("[\ufdd0-\ufdd4]")
SPAN_MARK = re.compile(f"[{BEGIN}{END}]")


class ControlTokens:
    """The special tokens of a tokenizer, found where a template wrote them and nowhere else."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = sorted(tokens, key=lambda token: (-len(token), token))  # the longest first, as vocabularies match
        names = "|".join(map(re.escape, self.tokens)) or "(?!)"  # which matches nothing
        self._name = re.compile(names)
        self._rendered = re.compile(f"{QUOTE}({names}){UNQUOTE}|({names})|[{QUOTE}{UNQUOTE}]")
        self._marked = re.compile(f"{CONTROL}({names})")
        self._space_behind_last = re.compile(f"({CONTROL}(?:{names}))(\\s+){END}")

    def quoted(self, value: Any) -> Any:
        """A message's JSON value in which every name of a control token is quoted."""
        if isinstance(value, str):
            text = MARK.sub("\N{REPLACEMENT CHARACTER}", value).encode("utf-8", "replace").decode()
            return self._name.sub(lambda found: f"{QUOTE}{found[0]}{UNQUOTE}", text)
        if isinstance(value, dict):
            return {self.quoted(key): self.quoted(inner) for key, inner in value.items()}
        return [self.quoted(inner) for inner in value] if isinstance(value, list) else value

    def marked(self, rendered: str) -> str:
        """Marked text of what a template made of quoted messages."""

        def mark(found: re.Match[str]) -> str:
            return found[1] or (f"{CONTROL}{found[2]}" if found[2] else "")

        return self._rendered.sub(mark, rendered)

    def next_written(self, rendered: str, start: int, token: str) -> int:
        """Where in a rendered text the first `token` from `start` on ends that is not quoted; -1 if there is none."""
        found = (one for one in self._rendered.finditer(rendered, start) if one[2] == token)
        return next((one.end() for one in found), -1)

    def without_space_behind(self, marked: str) -> str:
        """The marked text with every span that ends in a control token and white space ended behind the token."""
        return self._space_behind_last.sub(f"\\1{END}\\2", marked)

    def ranges(self, text: str) -> list[tuple[int, int]]:
        """Where marked text has control tokens, with their marks."""
        return [found.span() for found in self._marked.finditer(text)]

    def plain(self, marked: str) -> str:
        """The text without marks and control tokens."""
        return without_marks(self._marked.sub("", marked))


def without_marks(marked: str) -> str:
    return MARK.sub("", marked)


def spans_of(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Marked text without `BEGIN` and `END`, and the ranges of it that they enclosed."""
    spans, start = [], 0
    for removed, found in enumerate(SPAN_MARK.finditer(marked)):
        place = found.start() - removed
        if found[0] == BEGIN:
            start = place
        elif place > start:
            spans.append((start, place))
    return SPAN_MARK.sub("", marked), spans
