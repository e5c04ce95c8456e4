"""Logits with a cache against those of the whole text without it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import assert_near
from p828.config import RopeScaling
from p828.inference.decode.cache import SlotCache
from p828.inference.decode.cached_layers import CachedAttention, cached_hidden
from p828.model.backend import AttentionBackend
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

LENGTHS, NEW, SLOTS = [5, 2, 9, 1], 6, [3, 0, 4, 1]
# Float64 but for RoPE, whose angles are float32: an error of 2^-24 of an angle of up to 15.
TOLERANCE = 1e-6

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no sinks": {"attention_sinks": False},
    "yarn past the original context, qk norm": {"rope_scaling": RopeScaling(4.0, 4), "use_qk_norm": True},
    "two shared experts, of a product": {"n_shared_experts": 2, "hidden_act": "swiglu_of_product"},
}
BACKENDS: list[AttentionBackend] = ["reference", "flash_cpu"]


def wide_model(**changes: Any) -> Transformer:
    model = tiny_model(**changes).double()
    model.frequencies = model.frequencies.double()
    return model


def make_cache(model: Transformer) -> SlotCache:
    return SlotCache(model.config, 5, 20, torch.device("cpu"), torch.float64)


def expected_logits(model: Transformer, text_S: Tensor) -> Tensor:
    return model.logits(model(text_S[None], dtype=torch.float64).hidden_BSH)[0]


def step(
    model: Transformer,
    cache: SlotCache,
    backend: AttentionBackend,
    tokens_BS: Tensor,
    slots: list[int],
    begins: list[int],
) -> Tensor:
    positions_BS = torch.tensor(begins)[:, None] + torch.arange(tokens_BS.shape[1])
    used = int(positions_BS.max()) + 1
    attended = CachedAttention(cache, backend, torch.device("cpu"), slots, positions_BS, used)
    return model.logits(cached_hidden(model, tokens_BS, positions_BS, attended, torch.float64)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_prompts_of_unequal_length_go_on_together(variant: str, backend: AttentionBackend) -> None:
    """Each prompt alone, then a token of each at its own position."""
    model = wide_model(**VARIANTS[variant])
    texts = [torch.randint(97, (length + NEW,)) for length in LENGTHS]
    expected = [expected_logits(model, text) for text in texts]
    cache = make_cache(model)
    for text, length, slot, logits in zip(texts, LENGTHS, SLOTS, expected, strict=True):
        assert_near(step(model, cache, backend, text[None, :length], [slot], [0])[0], logits[:length], TOLERANCE)
    for new in range(NEW):
        at = [length + new for length in LENGTHS]
        tokens_B1 = torch.stack([text[place] for text, place in zip(texts, at, strict=True)])[:, None]
        logits_B1V = step(model, cache, backend, tokens_B1, SLOTS, at)
        for row, place in enumerate(at):
            assert_near(logits_B1V[row, 0], expected[row][place], TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_prompt_in_pieces(backend: AttentionBackend) -> None:
    model = wide_model()
    text = torch.randint(97, (12,))
    cache = make_cache(model)
    pieces, begin = [], 0
    for length in (4, 1, 5, 2):
        pieces.append(step(model, cache, backend, text[None, begin : begin + length], [2], [begin])[0])
        begin += length
    assert_near(torch.cat(pieces), expected_logits(model, text), TOLERANCE)


@torch.no_grad()
def test_what_a_slot_held_before_is_not_seen() -> None:
    model = wide_model()
    text = torch.randint(97, (6,))
    cache = make_cache(model)
    for values in (*cache.keys, *cache.values):
        values.fill_(1e3)
    logits = [step(model, cache, "reference", text[None, at : at + 1], [1], [at])[0, 0] for at in range(6)]
    assert_near(torch.stack(logits), expected_logits(model, text), TOLERANCE)


def test_slots_are_taken_and_given_back() -> None:
    cache = SlotCache(tiny_config(), 2, 4, torch.device("cpu"), torch.float32)
    taken = [cache.take(), cache.take()]
    assert sorted(taken) == [0, 1]
    assert cache.scratch == 2
    with pytest.raises(IndexError):
        cache.take()
    cache.give_back(taken[0])
    assert cache.take() == taken[0]
    with pytest.raises(AssertionError):
        cache.give_back(2)
