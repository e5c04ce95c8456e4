"""Logits with the cache against those of the whole text without it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import assert_near
from p828.config import RopeScaling
from p828.model.kv_cache import KVCache
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

LENGTHS, NEW = [5, 2, 9, 1], 6
# Two layers of float32 parts, each amplifying the rounding of the one before.
TOLERANCE = 1e-5

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no sinks": {"attention_sinks": False},
    "yarn, qk norm": {"rope_scaling": RopeScaling(4.0, 16), "use_qk_norm": True},
    "reference": {"attention_backend": "reference"},
}


def make_cache(model: Transformer, rows: int, length: int = 20) -> KVCache:
    return KVCache(model.config, rows, length, torch.device("cpu"), torch.float32)


def step(model: Transformer, cache: KVCache, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
    cache.extend(int(positions_BS.max()) + 1)
    return model.logits(model(tokens_BS, positions_BS, cache=cache).hidden_BSH)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_batched_prompts_of_unequal_length(variant: str) -> None:
    """Right-padded prompts in one go, then token by token, each row at its own position."""
    model = tiny_model(**VARIANTS[variant])
    texts = [torch.randint(97, (length + NEW,)) for length in LENGTHS]
    expected = [model.logits(model(text[None]).hidden_BSH)[0] for text in texts]

    longest = max(LENGTHS)
    padded = torch.stack(
        [torch.cat((t[:n], torch.full((longest - n,), 96))) for t, n in zip(texts, LENGTHS, strict=True)]
    )
    cache = make_cache(model, len(texts))
    logits = step(model, cache, padded, torch.arange(longest).expand(len(texts), -1))
    for row, length in enumerate(LENGTHS):
        assert_near(logits[row, :length], expected[row][:length], TOLERANCE)

    for new in range(NEW):
        positions = torch.tensor(LENGTHS)[:, None] + new
        tokens = torch.stack([text[length + new] for text, length in zip(texts, LENGTHS, strict=True)])[:, None]
        logits = step(model, cache, tokens, positions)
        for row, length in enumerate(LENGTHS):
            assert_near(logits[row, 0], expected[row][length + new], TOLERANCE)


@torch.no_grad()
def test_prompt_in_pieces() -> None:
    model = tiny_model()
    text = torch.randint(97, (2, 12))
    cache = make_cache(model, 2)
    pieces, start = [], 0
    for length in (4, 1, 5, 2):
        positions = torch.arange(start, start + length).expand(2, -1)
        pieces.append(step(model, cache, text[:, start : start + length], positions))
        start += length
    assert_near(torch.cat(pieces, 1), model.logits(model(text).hidden_BSH), TOLERANCE)


@torch.no_grad()
def test_selected_rows_go_on_as_themselves() -> None:
    model = tiny_model()
    text = torch.randint(97, (3, 8))
    cache = make_cache(model, 3)
    step(model, cache, text[:, :7], torch.arange(7).expand(3, -1))
    rows = torch.tensor([2, 0])
    cache.select(rows)
    logits = step(model, cache, text[rows, 7:], torch.full((2, 1), 7))
    assert_near(logits[:, 0], model.logits(model(text[rows]).hidden_BSH)[:, -1], TOLERANCE)


def test_too_long_a_text_is_refused() -> None:
    cache = KVCache(tiny_config(), 1, 4, torch.device("cpu"), torch.float32)
    cache.extend(4)
    with pytest.raises(ValueError, match="holds 4 tokens, not 5"):
        cache.extend(5)
