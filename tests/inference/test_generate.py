import dataclasses
import math
import string
from typing import NoReturn

import pytest
import torch
from taught_text import TAUGHT
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, DataError
from p828.inference.generate import Completion, Prompt, generate, open_decoder, pieces
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
PROMPTS = ["hello world", "", "a", "The longest of all prompts here", "def f(x):"]
VARIANTS = [
    {},
    {"attention_sinks": False, "use_qk_norm": True, "tie_word_embeddings": True},
    {"hidden_act": "swiglu_of_product", "n_group": 4, "topk_group": 2, "mask_documents": False},
]


def uncached_logits(model: Transformer, ids: list[int]) -> Tensor:
    """(V,): after the last token, from a full forward pass."""
    return model.logits(model(torch.tensor([ids])).hidden_BSH[0, -1])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_greedy_is_the_argmax_of_full_forward_passes(letters: Tokenizer, changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    completions = generate(model, letters, PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = letters.encode(prompt) or [letters.eos_id]
        expected: list[int] = []
        while len(expected) < 12:
            token = int(uncached_logits(model, ids + expected)[: letters.vocab_size].argmax())
            if token == letters.eos_id:
                break
            expected.append(token)
        assert completion.text == letters.decode(expected)
        assert completion.finish_reason == ("length" if len(expected) == 12 else "end")
    assert len({completion.text for completion in completions}) > 2


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.0, repetition_penalty=1.3, max_new_tokens=10),
        SamplingConfig(temperature=1.5, max_new_tokens=20, seed=3),
        SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.2, max_new_tokens=20, stop=("e", "x"), seed=4),
    ],
)
def test_batched_prompts_get_what_each_gets_alone(letters: Tokenizer, config: SamplingConfig) -> None:
    model = tiny_model()
    together = generate(model, letters, PROMPTS, config)
    alone = [generate(model, letters, [prompt], config)[0] for prompt in PROMPTS]
    assert together == alone


def test_rows_that_end_early_leave_the_others_alone(letters: Tokenizer) -> None:
    """Some rows end at a stop string while others run on: the batch shrinks on the way."""
    config = SamplingConfig(temperature=1.5, max_new_tokens=25, stop=("a", "b", "c", "d"), seed=1)
    completions = generate(tiny_model(), letters, PROMPTS, config)
    assert len({len(completion.text) for completion in completions}) > 2
    assert completions == [generate(tiny_model(), letters, [prompt], config)[0] for prompt in PROMPTS]


def test_the_seed_decides(letters: Tokenizer) -> None:
    model = tiny_model()
    texts = [
        [c.text for c in generate(model, letters, ["ab", "ab"], SamplingConfig(temperature=1.0, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1], "equal prompts are to get different samples"


def test_nothing_global_changes(letters: Tokenizer) -> None:
    model = tiny_model(dropout=0.5).train()
    before = torch.get_rng_state()
    first = generate(model, letters, ["ab"], SamplingConfig(temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert generate(model.eval(), letters, ["ab"], SamplingConfig(temperature=1.0)) == first
    assert not model.training


def test_training_mode_comes_back_after_an_error(letters: Tokenizer) -> None:
    def broken(index: int, text: str) -> None:
        raise BrokenPipeError

    model = tiny_model().train()
    with pytest.raises(BrokenPipeError):
        generate(model, letters, ["ab"], GREEDY, on_text=broken)
    assert model.training


def test_a_document_learnt_by_heart(taught: Transformer, byte_level: Tokenizer) -> None:
    """From the empty prompt, which stands for a document's beginning, to its end."""
    pieces: list[str] = []
    config = SamplingConfig(temperature=0.0, max_new_tokens=60)
    (completion,) = generate(taught, byte_level, [""], config, on_text=lambda _, text: pieces.append(text))
    assert completion == Completion(TAUGHT, "end", tuple(byte_level.encode(TAUGHT)))
    assert "".join(pieces) == TAUGHT
    assert "🙂" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" not in pieces


@pytest.mark.parametrize(
    "stop, text",
    [(("mat, and",), "The cat 🙂 sat on the "), (("nothing", "🙂"), "The cat "), (("dog.",), TAUGHT[:-4])],
)
def test_a_stop_string_ends_the_text_before_it(
    taught: Transformer, byte_level: Tokenizer, stop: tuple[str, ...], text: str
) -> None:
    pieces: list[str] = []
    config = SamplingConfig(temperature=0.0, max_new_tokens=60, stop=stop)
    (completion,) = generate(taught, byte_level, [""], config, on_text=lambda _, text: pieces.append(text))
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert byte_level.decode(completion.ids).startswith(text)
    assert "".join(pieces) == text


def test_a_stop_string_may_be_the_first_token(letters: Tokenizer) -> None:
    """While the next token is on its way."""
    model = tiny_model()
    (whole,) = generate(model, letters, ["hello world"], GREEDY)
    config = dataclasses.replace(GREEDY, stop=(whole.text[0],))
    first, other = generate(model, letters, ["hello world", "a"], config)
    assert first == Completion("", "stop", whole.ids[:1])
    assert other == generate(model, letters, ["a"], config)[0]


def test_a_caller_that_stops_leaves_the_decoder_free(letters: Tokenizer) -> None:
    """Among them prompts that still wait for a slot, and that are not read."""
    prompts = [Prompt(letters.encode(text), seed) for seed, text in enumerate(PROMPTS)]
    with open_decoder(tiny_model(), letters, torch.float32, [40] * 3, 12) as decoder:
        for taken in (1, 2, 7):
            found = pieces(decoder, letters, prompts, GREEDY)
            for _ in range(taken):
                next(found)
            found.close()
            decoder.check_idle()
        assert len({piece.place for piece in pieces(decoder, letters, prompts, GREEDY)}) == len(PROMPTS)
        decoder.check_idle()


def test_length_ends_the_text(taught: Transformer, byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TAUGHT)
    for length in (1, 3, len(ids)):
        config = SamplingConfig(temperature=0.0, max_new_tokens=length)
        (completion,) = generate(taught, byte_level, [""], config)
        assert completion == Completion(byte_level.decode(ids[:length]), "length", tuple(ids[:length]))


def test_the_context_ends_the_text(letters: Tokenizer) -> None:
    """Prompts of 60 and 63 tokens have room for 4 and 1 in a context of 64, where a third runs on."""
    config = SamplingConfig(temperature=0.0, max_new_tokens=20, seed=0)
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[letters.eos_id] = 0
    completions = generate(model, letters, ["a" * 60, "b" * 63, "c" * 44], config)
    assert [(len(c.text), c.finish_reason) for c in completions] == [(4, "context"), (1, "context"), (20, "length")]


def test_a_prompt_that_fills_the_context_is_refused(letters: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 64 tokens: at most 63 are accepted.*is 64"):
        generate(tiny_model(), letters, ["a", "b" * 64], GREEDY)


def test_a_prompt_that_is_no_unicode_is_refused(letters: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="not valid Unicode"):
        generate(tiny_model(), letters, ["a\udce9"], GREEDY)


def test_no_token_beyond_the_tokenizer(letters: Tokenizer) -> None:
    """The model likes its unused rows best."""
    model = tiny_model()
    assert letters.vocab_size < model.config.vocab_size
    with torch.no_grad():
        hidden_H = model(torch.tensor([letters.encode("ab")])).hidden_BSH[0, -1]
        model.head_weight[letters.vocab_size :] = hidden_H
        assert int(uncached_logits(model, letters.encode("ab")).argmax()) >= letters.vocab_size
    for temperature in (0.0, 1.0):
        config = SamplingConfig(temperature=temperature, max_new_tokens=1)
        (completion,) = generate(model, letters, ["ab"], config)
        assert completion.finish_reason == "end" or len(completion.text) == 1


def test_the_penalty_counts_prompt_and_text(letters: Tokenizer) -> None:
    model = tiny_model()
    config = SamplingConfig(temperature=0.0, repetition_penalty=2.0, max_new_tokens=10)
    penalise = RepetitionPenaltyLogitsProcessor(2.0)
    for prompt in ("hello", string.ascii_letters, string.digits + string.ascii_uppercase):
        ids = letters.encode(prompt)
        for _ in range(10):
            logits_1V = uncached_logits(model, ids)[None, : letters.vocab_size]
            ids.append(int(penalise(torch.tensor([ids]), logits_1V).argmax()))
            if ids[-1] == letters.eos_id:
                break
        assert generate(model, letters, [prompt], config)[0].text == letters.decode(ids)[len(prompt) :]


def test_diverged_weights_are_named(letters: Tokenizer) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[3] = math.nan
    with pytest.raises(DataError, match="diverged"):
        generate(model, letters, ["ab"], GREEDY)


def test_no_prompts_no_completions(letters: Tokenizer) -> None:
    assert generate(tiny_model(), letters, [], GREEDY) == []


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_compiled_layers_are_not_compiled_for_each_length(letters: Tokenizer, engine: str) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> NoReturn:
        raise AssertionError("compiled")

    model = tiny_model()
    expected = generate(model, letters, ["ab"], GREEDY)
    for layer in model.layers:
        if engine == "plain":
            layer.compile(backend=backend)
        else:
            layer.forward = torch.compile(layer.forward, backend=backend)
    assert generate(model, letters, ["ab"], GREEDY) == expected
    with pytest.raises(Exception, match="compiled"):
        model(torch.tensor([[1]]))
