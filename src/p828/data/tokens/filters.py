"""What `p828 prepare` may leave out: documents too short or too long, copies, and files that are no source code."""

import hashlib

import numpy as np
import numpy.typing as npt

from p828.config import PrepareConfig

LONGEST_LINE = 1000  # characters
LONGEST_MEAN_LINE = 100
LOWEST_ALPHANUMERIC_SHARE = 0.25
MERGED_TOGETHER = 1 << 20


def reason_to_drop(text: str, config: PrepareConfig) -> str | None:
    """Why a document is left out, copies aside; None if it is not."""
    if len(text) < config.min_characters:
        return "too_short"
    if config.max_characters and len(text) > config.max_characters:
        return "too_long"
    if config.only_code and not looks_like_code(text):
        return "not_code"
    return None


def looks_like_code(text: str) -> bool:
    """CodeParrot's rules (Tunstall, von Werra, Wolf: Natural Language Processing with Transformers, chapter 10).

    No line of over 1,000 characters, 100 in the mean, and at least a quarter of all characters letters or digits.
    """
    lengths = [len(line) for line in text.splitlines()]
    if not lengths or max(lengths) > LONGEST_LINE or sum(lengths) > LONGEST_MEAN_LINE * len(lengths):
        return False
    return sum(map(str.isalnum, text)) >= LOWEST_ALPHANUMERIC_SHARE * len(text)


class SeenTexts:
    """Which texts have been seen, by a hash of 64 bits: 8 bytes a text, and a chance of n²/2⁶⁵ of one false copy."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> int | None:
        """The text's hash if it is new, else None."""
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        if value in self._recent or self._is_sorted_in(value):
            return None
        self._recent.add(value)
        if len(self._recent) == MERGED_TOGETHER:
            self._merge()
        return value

    def load(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Go on with the hashes that `add` returned, in any order."""
        self._sorted, self._recent = np.sort(hashes), set()

    def _is_sorted_in(self, value: int) -> bool:
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value

    def _merge(self) -> None:
        recent = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._sorted = np.sort(np.concatenate([self._sorted, recent]), kind="stable")
        self._recent = set()
