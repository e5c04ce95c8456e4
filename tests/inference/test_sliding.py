"""A context that slides when it is full, against whole passes in float64 over what is left of it."""

import dataclasses
from typing import Any

import pytest
import torch

from p828.config import RopeScaling
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import KEPT, Wants
from p828.inference.generate import generate
from p828.inference.sampling import choose_tokens, row_settings, uniform_numbers
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

VOCABULARY, CONTEXT = 97, 24
LENGTHS = [[1], [2, 20, 40], [5, 6, 7, 8, 9, 24]]  # two of them are too long for a context


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def oracle(double: Transformer, prompt: list[int], config: SamplingConfig, seed: int, context: int) -> list[int]:
    """What a sequence should become: each token from the whole of its context, read from nothing."""
    ids, dropped = list(prompt), 0
    numbers = uniform_numbers(seed, len(prompt) + config.max_new_tokens)
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    seen[0, prompt] = True
    for _ in range(config.max_new_tokens):
        if len(ids) - dropped >= context:
            dropped = len(ids) - context // 2 - KEPT
        kept = ids[:KEPT] + ids[KEPT + dropped :]
        hidden_1SH = double(torch.tensor([kept]), dtype=torch.float64).hidden_BSH
        logits_1V = (hidden_1SH[:, -1] @ double.head_weight.T)[:, :VOCABULARY].float()
        settings = row_settings([config], torch.device("cpu"))
        token = choose_tokens(logits_1V, settings, numbers[len(ids) : len(ids) + 1], seen, has_filters=True).item()
        seen[0, token] = True
        ids.append(int(token))
    return ids


@pytest.mark.parametrize("prefill_tokens", [5, 2048])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.0, "repetition_penalty": 1.3}],
    ids=["greedy", "drawn", "penalty"],
)
@torch.no_grad()
def test_every_token_follows_what_is_left(sampling: dict[str, float], lengths: list[int], prefill_tokens: int) -> None:
    """Of sequences that slide at different times, some of them five times, and of which numbers are drawn once."""
    options: dict[str, Any] = (
        {"rope_scaling": RopeScaling(factor=2, original_max_position_embeddings=16)} if len(lengths) == 3 else {}
    )
    model, double = tiny_model(**options), tiny_model(**options).double()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, len(lengths), CONTEXT, prefill_tokens)
    config = SamplingConfig(**sampling, max_new_tokens=50, slide=True)
    sequences = [decoder.admit(prompt_of(length), config, seed=length) for length in lengths]
    while decoder.running:
        decoder.step()
    decoder.check_idle()
    for sequence, length in zip(sequences, lengths, strict=True):
        assert sequence.finish_reason == "length"
        assert sequence.ids == oracle(double, prompt_of(length), config, length, CONTEXT)
        assert sequence.dropped > 0


def test_without_it_the_text_ends() -> None:
    decoder = Decoder(tiny_model(), VOCABULARY, VOCABULARY, torch.float32, 1, CONTEXT)
    sequence = decoder.admit(prompt_of(5), SamplingConfig(temperature=0, max_new_tokens=50), seed=0)
    while decoder.running:
        decoder.step()
    assert (sequence.finish_reason, len(sequence.ids)) == ("context", CONTEXT)


@pytest.mark.parametrize("context", range(2, 12))
def test_short_contexts(context: int) -> None:
    """One of no more tokens than stay and one more has nothing that could slide."""
    decoder = Decoder(tiny_model(), VOCABULARY, VOCABULARY, torch.float32, 1, context)
    sequence = decoder.admit([3], SamplingConfig(temperature=0, max_new_tokens=40, slide=True), seed=0)
    while decoder.running:
        decoder.step()
    slides = context > KEPT + 1
    assert sequence.finish_reason == ("length" if slides else "context")
    assert len(sequence.ids) == (41 if slides else context)


def test_probabilities_are_told_once_and_one_can_be_cancelled_at_any_time() -> None:
    wants = Wants(probability=True, prompt=True)
    config = SamplingConfig(temperature=0, max_new_tokens=50, slide=True)
    decoder = Decoder(tiny_model(), VOCABULARY, VOCABULARY, torch.float32, 2, CONTEXT, prefill_tokens=5)
    for steps in range(1, 60, 3):
        whole, cancelled = (decoder.admit(prompt_of(7), config, seed=0, wants=wants) for _ in range(2))
        values = []
        for number in range(200):
            if number == steps and cancelled.finish_reason is None:
                decoder.cancel(cancelled)
            values += [one.probability for one in decoder.step() if one.sequence is whole]
        assert len(values) == 50
        assert None not in values
        assert len(whole.prompt_probabilities) == 7
        decoder.check_idle()


def test_a_stop_string_behind_what_was_dropped(letters: Tokenizer) -> None:
    """Is found, and cut off; what a text is depends neither on the others nor on their slides."""
    model, long = tiny_model(), "abc" * 40
    configs = (SamplingConfig(temperature=1.0, max_new_tokens=300, slide=True, seed=seed) for seed in range(100))
    config, alone = next(
        (config, text)
        for config in configs
        if len(text := generate(model, letters, ["ab"], config)[0].text) > 2 * model.config.max_position_embeddings
    )
    (other,) = generate(model, letters, [long], config)
    assert [alone, other.text] == [one.text for one in generate(model, letters, ["ab", long], config)]
    stop = alone[-5:]
    (stopped,) = generate(model, letters, ["ab"], dataclasses.replace(config, stop=(stop,)))
    assert stopped.text == alone[: alone.index(stop)]
    assert stopped.finish_reason == "stop"
