import random

import numpy as np
import pytest

from p828.config import PrepareConfig
from p828.data.tokens import filters
from p828.data.tokens.filters import SeenTexts, looks_like_code, reason_to_drop


@pytest.mark.parametrize("length, reason", [(9, "too_short"), (10, None), (20, None), (21, "too_long")])
def test_limits_are_of_characters_and_belong_to_what_is_kept(length: int, reason: str | None) -> None:
    assert reason_to_drop("ä" * length, PrepareConfig(min_characters=10, max_characters=20)) == reason


def test_without_limits_all_is_kept() -> None:
    assert [reason_to_drop(text, PrepareConfig()) for text in ("x", "%" * 10_000)] == [None, None]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("x" * 1000 + "\n" * 10, True),  # 100 characters a line in the mean
        ("x" * 1001 + "\n" * 20, False),
        ("x" * 100 + "\n" + "y" * 100, True),
        ("x" * 100 + "\n" + "y" * 101, False),
        ("ab((((((", True),  # a quarter
        ("ab(((((((", False),
        ("\n\n", False),
    ],
)
def test_codeparrots_rules(text: str, kept: bool) -> None:
    assert looks_like_code(text) == kept
    assert reason_to_drop(text, PrepareConfig(only_code=True)) == (None if kept else "not_code")


def test_of_copies_the_first_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MERGED_TOGETHER", 16)  # several merges
    draw = random.Random(0)
    texts = [str(draw.randrange(150)) for _ in range(600)]
    seen, known, hashes = SeenTexts(), set[str](), []
    for i, text in enumerate(texts):
        if i == 300:  # an interrupted preparation goes on
            seen = SeenTexts()
            seen.load(np.array(hashes, dtype=np.uint64))
        value = seen.add(text)
        assert (value is None) == (text in known)
        known.add(text)
        hashes += [] if value is None else [value]
