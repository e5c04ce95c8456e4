"""From token ids to token ids, without a tokenizer."""

import pytest
import torch
from taught_text import TAUGHT

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.continuations import Continuation, decode
from p828.inference.decode.sequence import FinishReason
from p828.inference.generate import generate
from p828.inference.sampling import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)
EOS, VOCABULARY = 96, 97


def greedy(model: Transformer, prompts: list[list[int]], **options: object) -> list[Continuation]:
    return decode(model, prompts, GREEDY, list(range(len(prompts))), EOS, VOCABULARY, **options)


def test_ids_are_the_likeliest_after_a_whole_pass() -> None:
    """Without a cache, one prompt at a time."""
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[EOS] = 0
    prompts = [[1, 2, 3], [50], [7] * 12]
    for prompt, continuation in zip(prompts, greedy(model, prompts), strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BSH[0, -1]).argmax()))
        assert continuation == Continuation(ids[len(prompt) :], "length")


def test_a_caller_sees_each_token_and_ends_a_continuation() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[EOS] = 0
    whole = greedy(model, [[1], [2]])
    seen: list[tuple[int, int, FinishReason | None]] = []

    def take(index: int, token: int, finish_reason: FinishReason | None) -> bool:
        seen.append((index, token, finish_reason))
        return index == 0 and [i for i, _, _ in seen].count(0) == 2

    stopped, other = greedy(model, [[1], [2]], on_token=take)
    assert stopped == Continuation(whole[0].ids[:2], "stop")
    assert other == whole[1]
    tokens = [token for index, token, _ in seen if index == 1]
    assert tokens == whole[1].ids
    assert [reason for index, _, reason in seen if index == 1] == [None] * 5 + ["length"]


def test_text_is_decoded_ids(taught: Transformer, byte_level: Tokenizer) -> None:
    """The document's end is told, and not part of the ids."""
    config = SamplingConfig(temperature=0.0, max_new_tokens=60)
    (continuation,) = decode(taught, [[]], config, [0], byte_level.eos_id, byte_level.vocab_size)
    assert continuation == Continuation(byte_level.encode(TAUGHT), "end")
    assert generate(taught, byte_level, [""], config)[0].text == byte_level.decode(continuation.ids)


def test_no_token_past_the_vocabulary() -> None:
    model = tiny_model()
    with torch.no_grad():
        hidden_H = model(torch.tensor([[5]])).hidden_BSH[0, -1]
        model.head_weight[40:] = 3 * hidden_H
    (continuation,) = decode(model, [[5]], GREEDY, [0], EOS, 40)
    assert max(continuation.ids) < 40


def test_as_many_seeds_as_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        decode(tiny_model(), [[1]], GREEDY, [], EOS, VOCABULARY)
