"""From token ids to token ids, without a tokenizer."""

import pytest
import torch
from taught_text import TAUGHT

from decoded import decoded, starts_steps_at_once
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence, NewToken, Wants
from p828.inference.generate import generate
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)
EOS, VOCABULARY = 96, 97


def never_ending() -> Transformer:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[EOS] = 0
    return model


def test_ids_are_the_likeliest_after_a_whole_pass() -> None:
    """Without a cache, one prompt at a time."""
    model = never_ending()
    prompts = [[1, 2, 3], [50], [7] * 12]
    for prompt, sequence in zip(prompts, decoded(model, prompts, GREEDY), strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BSH[0, -1]).argmax()))
        assert (sequence.continuation, sequence.finish_reason) == (ids[len(prompt) :], "length")


def test_a_caller_sees_each_token_and_cancels_a_continuation() -> None:
    model = never_ending()
    whole = [sequence.continuation for sequence in decoded(model, [[1], [2]], GREEDY)]
    decoder = Decoder(model, VOCABULARY, EOS, torch.float32, slots=2)
    first, other = (decoder.admit(prompt, GREEDY, seed=0) for prompt in ([1], [2]))
    seen: list[NewToken] = []
    while decoder.running:
        seen += decoder.step()
        if len(first.continuation) == 2 and first.finish_reason is None:
            decoder.cancel(first)
    decoder.check_idle()
    assert first.continuation == whole[0][:2]
    assert (other.continuation, other.finish_reason) == (whole[1], "length")
    assert [token.token for token in seen if token.sequence is other] == whole[1]
    assert [token.finish_reason for token in seen if token.sequence is other] == [None] * 5 + ["length"]


@pytest.mark.parametrize("slides", [False, True])
def test_steps_that_are_started_at_once_give_what_single_ones_give(slides: bool) -> None:
    """Of sequences that end by a token, by their length and by the context, beside one that is cancelled."""
    model = tiny_model()
    prompts = [[number] * (1 + number % 5) for number in range(40, 56)]

    def continued(decoder: Decoder) -> list[tuple[list[int], str | None]]:
        waiting, sequences, told = list(enumerate(prompts)), list[DecodedSequence](), dict[DecodedSequence, list[int]]()
        while waiting or decoder.running:
            while waiting and decoder.free_slots:
                seed, prompt = waiting.pop(0)
                config = SamplingConfig(max_new_tokens=5 + 3 * seed, slide=slides)
                sequences.append(decoder.admit(prompt, config, seed))
                told[sequences[-1]] = []
            for new in decoder.step():
                told[new.sequence].append(new.token)
            for fourth in sequences[3:4]:
                if fourth.finish_reason is None and len(fourth.continuation) >= 2:
                    decoder.cancel(fourth)
        decoder.check_idle()
        for sequence in sequences:
            ended = [EOS] if sequence.finish_reason == "end" else []
            assert told[sequence] == [*sequence.continuation, *ended]
        return [(sequence.ids, sequence.finish_reason) for sequence in sequences]

    def decoder() -> Decoder:
        return Decoder(model, VOCABULARY, EOS, torch.float32, slots=3, max_length=24, prefill_tokens=4)

    at_once, singly = continued(starts_steps_at_once(decoder())), continued(decoder())
    assert {reason for _, reason in singly} == {"end", "length", "stop"} | ({"context"} if not slides else set())
    del at_once[3], singly[3]
    assert at_once == singly


def test_a_first_token_waits_for_one_step_more_at_most() -> None:
    decoder = starts_steps_at_once(Decoder(never_ending(), VOCABULARY, EOS, torch.float32, slots=1))
    decoder.admit([1, 2], SamplingConfig(max_new_tokens=20), seed=0)
    told = [len(decoder.step()) for _ in range(4)]
    assert told == [0, 2, 3, 3]


@pytest.mark.parametrize("runs_behind", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_prompt_that_several_have_is_read_once(is_cancelled: bool, runs_behind: bool) -> None:
    """Each gets what it gets alone, also where the one in whose slot it was read in part is cancelled."""
    model = never_ending()
    rows: list[int] = []
    model.layers[0].mlp.gate.register_forward_hook(lambda gate, inputs, routing: rows.append(len(inputs[0])))
    prompt, wants = [3, 1, 4] * 7, Wants(likeliest=2, prompt=True)
    asked: list[tuple[list[int], SamplingConfig, Wants]] = [
        (prompt, SamplingConfig(max_new_tokens=6), wants),
        ([7, 8], GREEDY, wants),
        (prompt, SamplingConfig(max_new_tokens=6, repetition_penalty=2.0), wants),
        (prompt, SamplingConfig(max_new_tokens=9, top_k=5), wants),
        (prompt, GREEDY, Wants()),  # and so read for itself
    ]

    def continued(numbers: list[int]) -> tuple[list[DecodedSequence], int]:
        """With the number of tokens that the first layer was given."""
        decoder = Decoder(model, VOCABULARY, EOS, torch.float32, slots=5, prefill_tokens=8)
        decoder._steps.runs_behind = runs_behind
        rows.clear()
        sequences = [decoder.admit(asked[n][0], asked[n][1], seed=n, wants=asked[n][2]) for n in numbers]
        if is_cancelled and len(numbers) > 1:
            decoder.step()
            decoder.cancel(sequences[0])
        while decoder.running:
            decoder.step()
        decoder.check_idle()
        return sequences, sum(rows)

    together, read = continued([0, 1, 2, 3, 4])
    alone = [continued([number]) for number in range(5)]
    half = 8 if is_cancelled else 0  # tokens that were read for nobody
    assert read - half == sum(alone[number][1] for number in (0, 1, 4))
    for sequence, ((expected,), _) in list(zip(together, alone, strict=True))[is_cancelled:]:
        assert sequence.ids == expected.ids
        assert sequence.prompt_probabilities == expected.prompt_probabilities


def test_text_is_decoded_ids(taught: Transformer, byte_level: Tokenizer) -> None:
    """The document's end is told, and not part of the ids."""
    config = SamplingConfig(temperature=0.0, max_new_tokens=60)
    (sequence,) = decoded(taught, [[]], config, byte_level.eos_id, byte_level.vocab_size)
    assert (sequence.continuation, sequence.finish_reason) == (byte_level.encode(TAUGHT), "end")
    assert generate(taught, byte_level, [""], config)[0].text == byte_level.decode(sequence.continuation)


def test_no_token_past_the_vocabulary() -> None:
    model = tiny_model()
    with torch.no_grad():
        hidden_H = model(torch.tensor([[5]])).hidden_BSH[0, -1]
        model.head_weight[40:] = 3 * hidden_H
    (sequence,) = decoded(model, [[5]], GREEDY, vocab_size=40)
    assert max(sequence.continuation) < 40


def test_what_cannot_be_admitted() -> None:
    decoder = Decoder(tiny_model(), VOCABULARY, EOS, torch.float32, slots=1, max_length=8)
    with pytest.raises(ValueError, match="at most 7"):
        decoder.admit([1] * 8, GREEDY, seed=0)
    decoder.admit([1] * 7, GREEDY, seed=0)
    with pytest.raises(ValueError, match="no slot"):
        decoder.admit([1], GREEDY, seed=0)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_sequence(dtype: torch.dtype, is_whole: bool) -> None:
    """A token that makes no finite numbers, in prompts that are read wholly or in part; later ones get their slots."""
    model = never_ending()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    prompts = [[1, 2, 3], [7] * 20]

    def continuations(decoder: Decoder) -> list[list[int]]:
        sequences = [decoder.admit(prompt, GREEDY, seed=0) for prompt in prompts]
        while decoder.running:
            decoder.step()
        return [sequence.continuation for sequence in sequences]

    decoder, fresh = (Decoder(model, VOCABULARY, EOS, dtype, 2, 64, prefill_tokens=32) for _ in range(2))
    for before in ([], [[1]]):  # so that each slot is met
        for prompt in [*before, [5] * 60]:
            decoder.admit(prompt, GREEDY, seed=0)
            decoder.step()
        if is_whole:
            assert "diverged" in [token.finish_reason for token in decoder.step()]
        for sequence in decoder.running:
            decoder.cancel(sequence)
    for _ in range(2):
        prompts.reverse()
        assert continuations(decoder) == continuations(fresh)
