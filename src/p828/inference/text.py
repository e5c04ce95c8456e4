"""Tokens to text, given out as soon as it is certain."""

from collections.abc import Sequence

from p828.data.tokenizer import CUT_CHARACTER, Tokenizer

MOST_OF_A_CHARACTER = 4  # tokens of a character that is cut off, and one more


class TextStream:
    """The text of one continuation: whole characters only, ended before the first stop string.

    Text that may be the beginning of a stop string is held back until more tokens, or `finish`, decide.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        # Tokens from `_begin` on are decoded together, since a tokenizer may treat the first one that gives text
        # specially; those before `_decoded` have given theirs.
        self._ids = list(prompt_ids)
        self._begin, self._decoded = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token, maybe none."""
        self._ids.append(token)
        # Without text of its own a token is special, or a space that some tokenizers drop at the end.
        if self._tokenizer.is_byte(token) or not self._tokenizer.decode([token]):
            return ""
        text = self._undecoded()
        if not self._is_whole(text):
            return ""
        self._begin, self._decoded = self._decoded, len(self._ids)
        return self._release(text, end=False)

    def finish(self) -> str:
        """The text still held back, for no token follows; a character that was cut off is left out."""
        if self.stopped:
            return ""
        text = whole = self._undecoded()
        for _ in range(MOST_OF_A_CHARACTER):
            if self._is_whole(whole) or len(self._ids) == self._decoded:
                break
            self._ids.pop()
            whole = self._undecoded()
        else:
            whole = whole.rstrip(CUT_CHARACTER)
        # The token in which the cut-off character begins may have text before it.
        rest = text.removeprefix(whole).rstrip(CUT_CHARACTER) if text.startswith(whole) else ""
        return self._release(whole + rest, end=True)

    def _undecoded(self) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _is_whole(self, text: str) -> bool:
        """Whether the text of the newest tokens ends with a whole character."""
        return not text.endswith(CUT_CHARACTER) or self._tokenizer.ends_whole(self._ids[self._begin :])

    def _release(self, text: str, end: bool) -> str:
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            # The first to be complete, as if the text came character by character and not in tokens.
            self.stopped = True
            return text[: min(found)[1]]
        certain = len(text) if end else len(text) - self._possible_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop if n <= len(text))), 0)
