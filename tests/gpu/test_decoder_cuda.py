"""The decoder on a GPU, whose steps are CUDA graphs, against the training forward pass.

All experts are chosen (K = E), as in `test_model_cuda`: a choice that tips over is no error.
"""

from typing import Any

import pytest
import torch
from test_model_cuda import DEEP, SMALL

from p828.inference.decode import captured_steps
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import KEPT, DecodedSequence, TokenProbability, Wants
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

EOS, VOCABULARY, NEW = 96, 97, 12
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=NEW)
PROMPTS = [[5, 9, 2, 40, 7], [], [31] * 40, [8], list(range(60)), [31] * 40]  # of two that are alike one is read
VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_sinks": False, "use_qk_norm": True},
    {"n_shared_experts": 2, "hidden_act": "swiglu_of_product"},
    {"scoring_func": "softmax", "n_shared_experts": 0, "tie_word_embeddings": True},
]


def model_on(device: torch.device, **changes: Any) -> Transformer:
    """In bfloat16 as `load_model` stores it; its logits differ by a few, so that no two are near each other."""
    model = tiny_model(**{**SMALL, "max_position_embeddings": 96, **changes}).to(device).eval()
    with torch.no_grad():
        model.head_weight.mul_(30)
    return model


def run(
    decoder: Decoder, prompts: list[list[int]], config: SamplingConfig, wants: Wants
) -> list[tuple[DecodedSequence, list[TokenProbability]]]:
    waiting = list(enumerate(prompts))
    found: list[tuple[DecodedSequence, list[TokenProbability]]] = []
    probabilities: dict[DecodedSequence, list[TokenProbability]] = {}
    while waiting or decoder.running:
        while waiting and decoder.free_slots:
            seed, prompt = waiting.pop(0)
            sequence = decoder.admit(prompt, config, seed, wants=wants)
            probabilities[sequence] = []
            found.append((sequence, probabilities[sequence]))
        for new in decoder.step():
            assert (new.probability is not None) == wants.probability
            if new.probability is not None:
                probabilities[new.sequence].append(new.probability)
    decoder.check_idle()
    return found


@pytest.mark.parametrize("slots, piece", [(8, 2048), (2, 2048), (3, 16)])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_probabilities_are_those_of_the_training_forward(
    cuda: torch.device, changes: dict[str, Any], slots: int, piece: int
) -> None:
    """Prompts of unequal length, in pieces, through slots that others have left."""
    model = model_on(cuda, **changes)
    decoder = Decoder(model, VOCABULARY, EOS, torch.bfloat16, slots, prefill_tokens=piece)
    assert isinstance(decoder._steps, captured_steps.CapturedSteps)
    for sequence, ours in run(decoder, PROMPTS, GREEDY, Wants(probability=True, prompt=True)):
        ids = torch.tensor([sequence.ids], device=cuda)
        with torch.no_grad():
            logits_SV = model.logits(model(ids, dtype=torch.bfloat16).hidden_BSH)[0, :, :VOCABULARY]
        logs_SV = logits_SV.log_softmax(-1)
        scale = logits_SV.abs().max().item()
        continuation = sequence.continuation
        told = [*sequence.prompt_probabilities[1:], *ours[: len(continuation)]]
        for place, (token, probability) in enumerate(zip(sequence.ids[1:], told, strict=True)):
            assert probability is not None
            assert probability.value == pytest.approx(logs_SV[place, token].item(), abs=2 * DEEP * scale)


@pytest.mark.parametrize("piece", [2048, 16])
def test_a_context_that_slides(cuda: torch.device, piece: int) -> None:
    """Each token's probability is that of a forward pass over what is left of its context."""
    model = model_on(cuda)
    never = VOCABULARY  # ends no text
    decoder = Decoder(model, VOCABULARY, never, torch.bfloat16, 3, prefill_tokens=piece)
    config = SamplingConfig(temperature=1.0, max_new_tokens=220, slide=True)
    for sequence, ours in run(decoder, [[5, 9, 2, 40, 7], [31] * 40, list(range(60))], config, Wants(probability=True)):
        assert (sequence.finish_reason, len(ours)) == ("length", 220)
        dropped = 0
        for place in range(sequence.prompt_length, len(sequence.ids)):
            if place - dropped == 96:
                dropped = place - 96 // 2 - KEPT
            if place % 5 == 0 or place - dropped < 56:
                ids = sequence.ids[:KEPT] + sequence.ids[KEPT + dropped : place]
                with torch.no_grad():
                    hidden_1SH = model(torch.tensor([ids], device=cuda), dtype=torch.bfloat16).hidden_BSH
                    logits_V = model.logits(hidden_1SH[:, -1])[0, :VOCABULARY]
                value, scale = logits_V.log_softmax(-1)[sequence.ids[place]].item(), logits_V.abs().max().item()
                told = ours[place - sequence.prompt_length]
                assert told.value == pytest.approx(value, abs=2 * DEEP * scale)
        assert dropped > 96


@pytest.mark.parametrize("config", [SamplingConfig(max_new_tokens=NEW), SamplingConfig(top_p=0.9, max_new_tokens=NEW)])
def test_what_a_sequence_draws_does_not_depend_on_the_others(cuda: torch.device, config: SamplingConfig) -> None:
    model = model_on(cuda)
    wants = Wants(probability=True)
    together = run(Decoder(model, VOCABULARY, EOS, torch.bfloat16, 4), PROMPTS, config, wants)
    again = run(Decoder(model, VOCABULARY, EOS, torch.bfloat16, 4), PROMPTS, config, wants)
    assert [s.ids for s, _ in together] == [s.ids for s, _ in again]
    assert len({tuple(s.continuation) for s, _ in together}) > 1


def test_a_prepared_decoder_captures_no_more(cuda: torch.device) -> None:
    decoder = Decoder(model_on(cuda), VOCABULARY, EOS, torch.bfloat16, 5)
    decoder.prepare()
    steps = decoder._steps
    assert isinstance(steps, captured_steps.CapturedSteps)
    captured = {*steps._steps}, {*steps._pieces}
    for config in (
        GREEDY,
        SamplingConfig(temperature=0.0, top_p=0.5, max_new_tokens=NEW),
        SamplingConfig(top_k=3, max_new_tokens=NEW),
        SamplingConfig(temperature=0.0, repetition_penalty=1.3, max_new_tokens=NEW),
        SamplingConfig(repetition_penalty=1.3, min_p=0.1, max_new_tokens=NEW),
    ):
        for wants in (Wants(), Wants(probability=True)):
            run(decoder, PROMPTS, config, wants)
    assert ({*steps._steps}, {*steps._pieces}) == captured


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_steps_of_one_graph_give_what_single_ones_give(cuda: torch.device, slots: int, temperature: float) -> None:
    """With probabilities each step is started by itself. No text ends by a token, so that steps have the same rows."""
    model = model_on(cuda)
    config = SamplingConfig(temperature, max_new_tokens=80)

    def tokens(wants: Wants) -> tuple[list[list[int]], set[int]]:
        decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.bfloat16, slots)
        steps = decoder._steps
        assert isinstance(steps, captured_steps.CapturedSteps)
        prompts = enumerate([prompt for prompt in PROMPTS if prompt][:slots])
        sequences = [decoder.admit(prompt, config, seed, wants=wants) for seed, prompt in prompts]
        while decoder.running:
            decoder.step()
        decoder.check_idle()
        return [sequence.ids for sequence in sequences], {kind.steps for kind in steps._steps}

    expected, one = tokens(Wants(probability=True))
    for _ in range(5):
        actual, several = tokens(Wants())
        assert (one, several) == ({1}, {1, captured_steps.STEPS_AT_ONCE})
        assert actual == expected


@pytest.mark.parametrize("is_split", [False, True])
def test_kernels_that_overlap_give_the_same_bits(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, is_split: bool
) -> None:
    """As kernels that run one after another, with a program for each token's router or for each expert of it."""
    from p828.kernels.decode import dependent_launch_triton, route_triton  # import Triton

    if is_split:
        monkeypatch.setattr(route_triton, "ELEMENTS", 0)
    model = model_on(cuda)

    def all_probabilities() -> list[list[float]]:
        decoder = Decoder(model, VOCABULARY, EOS, torch.bfloat16, 4)
        return [[p.value for p in ours] for _, ours in run(decoder, PROMPTS, GREEDY, Wants(probability=True))]

    overlapping = all_probabilities()
    monkeypatch.setattr(dependent_launch_triton, "ALLOWED", False)
    assert all_probabilities() == overlapping
