"""The server by OpenAI's own client, held against `p828.inference` on the same model."""

import math

import openai
import pytest
import torch
from openai.types.completion_choice import Logprobs
from serving import CONTEXT, EOS, NAME, Served

from p828.inference.answer import answer, prompt_of
from p828.inference.generate import generate
from p828.inference.sampling_config import SamplingConfig

GREEDY = {"temperature": 0.0}
PROMPTS = ["the cat", "and the dog sat on", "", "mat 🙂 é"]


def generated(served: Served, prompts: list[str], **sampling: object) -> list[str]:
    loaded = served.loaded
    config = SamplingConfig(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return [completion.text for completion in generate(loaded.model, loaded.tokenizer, prompts, config)]


def log_softmax_of(served: Served, ids: list[int]) -> torch.Tensor:
    """Of the token after each of the ids, by the training forward: (S, V)."""
    model = served.loaded.model
    with torch.no_grad():
        logits_SV = model.logits(model(torch.tensor([ids])).hidden_BSH[0])[:, : served.loaded.tokenizer.vocab_size]
    return logits_SV.log_softmax(-1)


def test_the_model_is_listed(openai_client: openai.OpenAI) -> None:
    (model,) = openai_client.models.list()
    assert (model.id, model.owned_by) == (NAME, "p828")
    assert (model.model_extra or {})["max_model_len"] == CONTEXT
    assert openai_client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'runn' here; did you mean run"):
        openai_client.models.retrieve("runn")
    with pytest.raises(openai.NotFoundError, match="There is run"):
        openai_client.completions.create(model="gpt", prompt="a")


def test_greedy_completions_are_those_of_generate(served: Served, openai_client: openai.OpenAI) -> None:
    found = openai_client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=24, **GREEDY)
    expected = generated(served, PROMPTS, max_new_tokens=24)
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in found.choices} <= {"length", "stop"}
    prompt_tokens = sum(len(served.loaded.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert found.usage is not None
    assert found.usage.prompt_tokens == prompt_tokens
    ids = [served.loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    by_ids = openai_client.completions.create(model=NAME, prompt=ids, max_tokens=24, **GREEDY)
    assert [choice.text for choice in by_ids.choices] == expected
    one = openai_client.completions.create(model=NAME, prompt=ids[1], max_tokens=24, **GREEDY)
    assert [choice.text for choice in one.choices] == expected[1:2]


def test_sampled_completions_are_those_of_generate_with_the_same_seed(
    served: Served, openai_client: openai.OpenAI
) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    found = openai_client.completions.create(
        model=NAME, prompt=PROMPTS[:2], n=2, max_tokens=12, extra_body=more, **sampling
    )
    each = [[*PROMPTS[:1]] * 2, [*PROMPTS[1:2]] * 2]
    expected = [text for prompts in each for text in generated(served, prompts, max_new_tokens=12, **sampling, **more)]
    assert [choice.text for choice in found.choices] == expected
    assert len(set(expected)) == 4
    unseeded = {openai_client.completions.create(model=NAME, prompt="the", max_tokens=12).choices[0].text for _ in "12"}
    assert len(unseeded) == 2


def test_the_default_is_sixteen_tokens(openai_client: openai.OpenAI) -> None:
    found = openai_client.completions.create(model=NAME, prompt="the cat", extra_body={"user": "me"})
    assert found.usage is not None
    assert found.usage.completion_tokens == 16 or found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", [None, " the", [" the", "at"]])
def test_streamed_text_is_that_of_the_whole_answer(openai_client: openai.OpenAI, stop: list[str] | str | None) -> None:
    asked = {"model": NAME, "prompt": PROMPTS, "max_tokens": 30, "stop": stop, "seed": 3, "n": 2, "logprobs": 2}
    whole = openai_client.completions.create(**asked)
    texts, tokens, reasons = [""] * 8, [[] for _ in range(8)], [""] * 8
    usage = None
    for event in openai_client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = event.usage
        for choice in event.choices:
            assert not reasons[choice.index], "nothing comes after the reason"
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.text_offset or []
            reasons[choice.index] = choice.finish_reason or ""
    assert usage == whole.usage
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs and choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_an_answer_ends_before_a_stop_string(served: Served, openai_client: openai.OpenAI) -> None:
    (text,) = generated(served, ["the cat"], max_new_tokens=30)
    stop = text[4:6]
    found = openai_client.completions.create(model=NAME, prompt="the cat", max_tokens=30, stop=stop, **GREEDY)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_a_full_context_ends_an_answer(served: Served, openai_client: openai.OpenAI) -> None:
    ids = served.loaded.tokenizer.encode("the cat and the dog")
    found = openai_client.completions.create(model=NAME, prompt=ids, max_tokens=CONTEXT, **GREEDY)
    assert found.usage is not None
    assert found.usage.total_tokens == CONTEXT
    assert found.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=rf"the prompt has {CONTEXT} tokens: at most {CONTEXT - 1}"):
        openai_client.completions.create(model=NAME, prompt=[1] * CONTEXT)


def test_log_probabilities_with_an_echo_are_those_of_the_training_forward(
    served: Served, openai_client: openai.OpenAI
) -> None:
    tokenizer = served.loaded.tokenizer
    asked = {"model": NAME, "prompt": PROMPTS[:2] + PROMPTS[3:], "logprobs": 3, "echo": True, **GREEDY}
    found = openai_client.completions.create(**asked, max_tokens=6)
    texts = generated(served, asked["prompt"], max_new_tokens=6)
    for choice, prompt, text in zip(found.choices, asked["prompt"], texts, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert choice.text == prompt + text
        ids = tokenizer.encode(prompt)
        assert (logprobs.text_offset or [])[len(ids)] == len(prompt), "where the answer begins"
        (by_ids,) = openai_client.completions.create(**{**asked, "prompt": ids}, max_tokens=6).choices
        assert by_ids.logprobs is not None
        assert by_ids.logprobs.tokens == logprobs.tokens
        assert by_ids.logprobs.text_offset == logprobs.text_offset
        assert (by_ids.logprobs.token_logprobs or [])[1:] == pytest.approx(values_of(logprobs)[1:], abs=1e-4)
        alone = openai_client.completions.create(**{**asked, "prompt": prompt}, max_tokens=0)
        assert alone.choices[0].text == prompt
        assert alone.usage is not None
        assert alone.usage.completion_tokens == 0
        assert alone.choices[0].logprobs is not None
        assert values_of(alone.choices[0].logprobs)[1:] == pytest.approx(values_of(logprobs)[1 : len(ids)], abs=1e-4)
        check_against_forward(served, ids, logprobs)


def values_of(logprobs: Logprobs) -> list[float]:
    return [math.nan if value is None else value for value in logprobs.token_logprobs or []]


def check_against_forward(served: Served, prompt: list[int], logprobs: Logprobs) -> None:
    values, likeliest = logprobs.token_logprobs or [], logprobs.top_logprobs or []
    assert values[0] is None
    assert likeliest[0] is None
    ids = list(prompt)
    while len(ids) < len(values):  # greedy: the tokens of the answer follow from the forward
        ids.append(int(log_softmax_of(served, ids)[-1].argmax()))
    expected_SV = log_softmax_of(served, ids)
    for place in range(1, len(values)):
        row = expected_SV[place - 1]
        assert values[place] == pytest.approx(row[ids[place]].item(), abs=1e-4)
        best = sorted(likeliest[place].values(), reverse=True)
        assert best[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert len(best) in (3, 4)


def test_offsets_are_where_a_token_begins_and_of_a_part_of_a_character_where_that_does(
    openai_client: openai.OpenAI,
) -> None:
    asked = {"model": NAME, "max_tokens": 0, "logprobs": 0, "echo": True}
    (choice,) = openai_client.completions.create(**asked, prompt="the cat 🙂 é on the").choices
    logprobs = choice.logprobs
    assert logprobs is not None
    offsets = logprobs.text_offset or []
    ends = [*offsets[1:], len(choice.text)]
    pieces = [choice.text[start:end] for start, end in zip(offsets, ends, strict=True)]
    assert "".join(pieces) == choice.text
    assert pieces.count("🙂") == 1
    emoji = pieces.index("🙂")
    assert pieces[emoji - 3 : emoji] == [""] * 3, "its other three tokens"
    whole = [(piece, token) for piece, token in zip(pieces, logprobs.tokens or [], strict=True) if piece.isascii()]
    assert [piece for piece, _ in whole if piece] == [token for piece, token in whole if piece]


def test_chat_is_that_of_answer(served: Served, openai_client: openai.OpenAI) -> None:
    loaded = served.loaded
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat?"}]
    config = SamplingConfig(temperature=0.7, seed=5, max_new_tokens=20)
    (expected,) = answer(loaded.model, loaded.tokenizer, [talk], config)
    asked = {"model": NAME, "messages": talk, "temperature": 0.7, "seed": 5, "logprobs": True, "top_logprobs": 2}
    found = openai_client.chat.completions.create(**asked, max_completion_tokens=20)
    choice = found.choices[0]
    assert choice.message.content == expected.text
    template = loaded.tokenizer.template
    assert template is not None
    (tokens,) = loaded.tokenizer.encode_marked([prompt_of(template, talk)])
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(tokens)
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert len(content) == found.usage.completion_tokens
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert spelled.decode(errors="ignore").startswith((choice.message.content or "")[:3])
    first = log_softmax_of(served, tokens["id"].tolist())[-1]
    assert [one.logprob for one in content[0].top_logprobs] == pytest.approx(first.topk(2).values.tolist(), abs=1e-4)
    assert math.exp(content[0].logprob) <= math.exp(content[0].top_logprobs[0].logprob) + 1e-6
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in talk]
    again = openai_client.chat.completions.create(**{**asked, "messages": parts}, max_tokens=20)
    assert again.choices[0].message == choice.message


def test_streamed_chat_is_that_of_the_whole_answer(openai_client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": "the cat?"}]
    asked = {"model": NAME, "messages": talk, "n": 2, "seed": 1, "max_tokens": 20}
    whole = openai_client.chat.completions.create(**asked)
    texts, roles, reasons = ["", ""], [[], []], ["", ""]
    for event in openai_client.chat.completions.create(**asked, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += [choice.delta.role] if choice.delta.role else []
            reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [["assistant"]] * 2
    assert reasons == [choice.finish_reason for choice in whole.choices]
    # what came back may be sent again as it is
    more = [*talk, whole.choices[0].message.model_dump(), talk[0]]
    openai_client.chat.completions.create(model=NAME, messages=more, max_tokens=1)


def test_an_answer_may_take_the_rest_of_the_context(openai_client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": "the cat?"}]
    found = openai_client.chat.completions.create(model=NAME, messages=talk, temperature=0, logit_bias={})
    assert found.usage is not None
    assert found.usage.total_tokens == CONTEXT or found.choices[0].finish_reason == "stop"


def test_experts_are_told_of_each_token(served: Served, openai_client: openai.OpenAI) -> None:
    extra = {"experts": True}
    asked = {"model": NAME, "max_tokens": 8, "seed": 1, "logprobs": 0}
    found = openai_client.completions.create(**asked, prompt="the cat", echo=True, extra_body=extra)
    experts = (found.choices[0].model_extra or {})["experts"]
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert len(experts) == len(logprobs.tokens or [])
    without = openai_client.completions.create(
        **{**asked, "logprobs": None}, prompt="the cat", echo=True, extra_body=extra
    )
    assert (without.choices[0].model_extra or {})["experts"] == experts
    config = served.loaded.config.model
    chosen = [layers for layers in experts if layers is not None]
    assert chosen
    for layers in chosen:
        assert len(layers) == config.num_hidden_layers
        assert all(len(set(one)) == config.num_experts_per_tok for one in layers)


def test_a_special_token_in_a_text_is_text(served: Served, openai_client: openai.OpenAI) -> None:
    found = openai_client.completions.create(model=NAME, prompt=EOS, max_tokens=1)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(served.loaded.tokenizer.encode(EOS)) > 1
