"""Fingerprints of windows are the same wherever the text stands, and those of other text are others."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from p828.data.batch import Sample
from p828.data.fingerprints import PER_ROW, WINDOW, SeenRows, fingerprints
from p828.data.loader import make_batch


def of(tokens_BS: npt.NDArray[np.int64]) -> set[int]:
    return set(fingerprints(tokens_BS, np.ones(tokens_BS.shape, bool))[1].tolist())


@pytest.mark.parametrize("length", [40, 600, 2048])
def test_text_keeps_its_fingerprints_in_other_rows(length: int) -> None:
    draw = np.random.default_rng(length)
    text = draw.integers(50_000, size=8 * length)
    whole = of(text.reshape(8, length))
    shifted = of(np.roll(text, 7).reshape(8, length))
    # A row that begins seven tokens earlier loses the windows over its last seven tokens, and those over the borders.
    lost = (WINDOW - 1 + 7) / length
    assert len(whole & shifted) > (1 - 2 * lost) * len(whole)
    assert not whole & of(draw.integers(50_000, size=(8, length))), "hashes of 64 bits"
    expected = 8 * min(PER_ROW, length - WINDOW + 1)
    assert 0.7 * expected <= len(whole) <= 1.5 * expected


def test_order_and_numbers_of_tokens_count() -> None:
    row = np.arange(1, WINDOW + 1)[None]
    others = [row[:, ::-1], row + 1, np.zeros_like(row), np.zeros_like(row) + 1]
    assert len(set().union(of(row), *map(of, others))) == 5


def test_rows_shorter_than_a_window_and_padding_have_none() -> None:
    assert not of(np.zeros((2, WINDOW - 1), int))
    is_token = np.arange(2 * WINDOW)[None] < WINDOW + 3
    rows, _ = fingerprints(np.zeros((1, 2 * WINDOW), int), is_token)
    assert len(rows) == 4, "windows that end in the first 19 tokens"


def test_the_share_of_rows_that_are_seen() -> None:
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(300, size=65), np.zeros(65, np.int32)) for _ in range(4)]
    seen = SeenRows([make_batch(samples[:3], True), make_batch(samples[3:], True)])
    assert seen.share(seen.seen) == 0
    seen.note([make_batch(samples[1:3], True)])
    assert seen.share(seen.seen) == 0.5
    half = dataclasses.replace(samples[0], tokens=np.concatenate([samples[0].tokens[:30], draw.integers(300, size=35)]))
    seen.note([make_batch([half], True)])
    assert seen.share(seen.seen) == 0.5, "less than half of a row's windows"
    short = SeenRows([make_batch([Sample(np.arange(9), np.zeros(9, np.int32))], True)])
    short.note([make_batch(samples, True)])
    assert short.share(short.seen) is None
