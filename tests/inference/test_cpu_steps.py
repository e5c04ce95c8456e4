"""Steps on a CPU against the whole pass in float64, for every option of the model."""

from typing import Any

import numpy as np
import pytest
import torch

from p828.config import RopeScaling
from p828.inference.decode import cpu_layers, cpu_steps
from p828.inference.decode.cpu_steps import CpuSteps
from p828.inference.decode.cpu_token import routed
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence, Wants
from p828.inference.decode.steps import PlainSteps
from p828.inference.load import store_in
from p828.inference.sampling_config import SamplingConfig
from p828.kernels.decode import cpu
from p828.kernels.decode.cpu import FEW, HUGE, LARGE, MEDIUM, MOST_COMPARED, PIECES, Matrix
from p828.kernels.decode.float16_cpu import Float16Matrix, has_float16_products
from p828.model.router import routing_of
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

VOCABULARY = 97
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no sinks, one key head": {"attention_sinks": False, "num_key_value_heads": 1},
    "norms on q and k, YaRN": {
        "use_qk_norm": True, "rope_scaling": RopeScaling(factor=4, original_max_position_embeddings=16),
    },
    "product, two shared": {"hidden_act": "swiglu_of_product", "n_shared_experts": 2},
    "softmax, groups, none shared": {
        "n_shared_experts": 0, "scoring_func": "softmax", "n_group": 4, "topk_group": 2,
    },
    "tied, weights not normalised": {
        "tie_word_embeddings": True, "norm_topk_prob": False, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
GREEDY = SamplingConfig(temperature=0, max_new_tokens=6)


def decoded(decoder: Decoder, prompts: list[list[int]]) -> dict[DecodedSequence, list[tuple[float, Any]]]:
    """Each continuation's tokens: their log-probability and experts."""
    wants = Wants(probability=True, experts=True)
    found: dict[DecodedSequence, list[tuple[float, Any]]] = {
        decoder.admit(prompt, GREEDY, seed=0, wants=wants): [] for prompt in prompts
    }
    while decoder.running:
        for token in decoder.step():
            assert token.probability is not None
            found[token.sequence].append((token.probability.value, token.experts_LK))
    return found


def assert_exact(decoder: Decoder, double: Transformer, prompts: list[list[int]]) -> None:
    """Tokens and their log-probabilities are those of the same weights in float64."""
    for sequence, tokens in decoded(decoder, prompts).items():
        output = double(torch.tensor([sequence.ids]), dtype=torch.float64)
        logs_SV = (output.hidden_BSH[0] @ double.head_weight.T).log_softmax(-1)
        for place, (value, _) in enumerate(tokens, sequence.prompt_length):
            # Two layers leave some 1e-6 of numbers near 1, and a token's log-probability is the sum of two.
            assert value == pytest.approx(logs_SV[place - 1, sequence.ids[place]].item(), abs=5e-6)
            assert logs_SV[place - 1].argmax() == sequence.ids[place]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "where, factor, is_told",
    [("", 1e6, False), ("", 1e16, True), ("lm_head", 1e39, True), ("model.norm", 1e39, True), ("lm_head", 1e37, False)],
)
def test_a_model_that_has_diverged_is_told_of_once(where: str, factor: float, is_told: bool) -> None:
    """Products overflow in all; norms make finite numbers of those before them."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if where in name:
                parameter.mul_(factor)
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=1, max_length=40)
    (sequence,) = decoded(decoder, [[1, 2, 3]])
    assert (sequence.finish_reason == "diverged") == is_told


@pytest.mark.parametrize("are_large", [False, True])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_against_the_whole_pass(options: dict[str, Any], are_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal lengths side by side, few and more, and one alone; RoPE's tables and the weights are float32.

    Also with products as of large matrices, and experts that are not computed together.
    """
    if are_large:
        monkeypatch.setattr(cpu, "LARGE", 0)
        monkeypatch.setattr(cpu, "MEDIUM", 0)
        monkeypatch.setattr(cpu_layers, "TOGETHER", 0)
    model, double = tiny_model(**options), tiny_model(**options).double()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=FEW + 1, max_length=40)
    assert isinstance(decoder._steps, CpuSteps)
    few = [[1, 2, 3], [5] * 17, [7, 8]]
    for prompts in (few, [*few, [11] * 5, [12, 13]], [[9, 10]]):
        assert_exact(decoder, double, prompts)
    decoder.check_idle()


@pytest.mark.parametrize("prompts", [[[3, 1, 4, 1, 5], [9, 2, 6]], [[2, 7, 1, 8]]], ids=["two", "one"])
def test_the_experts_are_the_routers(prompts: list[list[int]]) -> None:
    model = tiny_model()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=2, max_length=40)
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, inputs, routing: seen.append(routing.experts_TK))
    for sequence, tokens in decoded(decoder, prompts).items():
        seen.clear()
        model(torch.tensor([sequence.ids]))
        assert tokens[0][1] is None
        for place, (_, experts_LK) in enumerate(tokens[1:], sequence.prompt_length):
            assert experts_LK == tuple(tuple(experts_TK[place].tolist()) for experts_TK in seen)


def test_slots_that_do_not_lie_side_by_side() -> None:
    """What a sequence gets is the same where another one's slot has become free."""
    model = tiny_model()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=4, max_length=40)
    prompts = [[1, 2], [3] * 9, [4, 5, 6], [7]]
    expected = [sequence.ids for sequence in decoded(decoder, prompts)]
    sequences = [decoder.admit(prompt, GREEDY, seed=0) for prompt in prompts]
    decoder.step()
    decoder.cancel(sequences[1])
    while decoder.running:
        decoder.step()
    assert [sequences[i].ids for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert len({sequence.slot for sequence in sequences}) == 4


@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("rows", [40, MEDIUM // 64, LARGE // 64, LARGE // 64 + PIECES - 1, HUGE // 64])
def test_products_of_small_and_large_matrices(tokens: int, rows: int) -> None:
    weight_VH, x_TH, out_TV = torch.randn(rows, 64), torch.randn(tokens, 64), torch.randn(tokens, rows)
    matrix = Matrix(weight_VH)
    assert (matrix.is_medium, matrix.is_large) == (rows >= MEDIUM // 64, rows >= LARGE // 64)
    expected = x_TH.double() @ weight_VH.double().T
    # Sums of 64 products of numbers near 1.
    torch.testing.assert_close(matrix(x_TH).double(), expected, rtol=0, atol=1e-4)
    sums = out_TV.double() + expected
    matrix.add_product_(out_TV, x_TH)
    torch.testing.assert_close(out_TV.double(), sums, rtol=0, atol=1e-4)


@pytest.fixture(params=[False, True], ids=["first part", "both parts"])
def huge_heads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "HUGE", 0)
    monkeypatch.setattr(cpu, "IS_AVX2", request.param)


@pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("sequences", [1, 3, MOST_COMPARED, MOST_COMPARED + 1])
@pytest.mark.usefixtures("huge_heads")
def test_greedy_tokens_from_a_packed_head(sequences: int, is_prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are those of whole logits. A head is packed beforehand, or once it is worth it.

    Prompts are read one a step, so that few sequences have steps first.
    """
    monkeypatch.setattr(cpu_steps, "WORTH_PACKING", 3)
    model = tiny_model()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=sequences, max_length=40)
    assert isinstance(decoder._steps, CpuSteps)
    head = decoder._steps.head
    assert isinstance(head, Matrix)
    prompts = [[3 * number + 1, 5] for number in range(sequences)]
    expected = [sequence.ids for sequence in decoded(decoder, prompts)]
    vars(head).pop("in_parts", None)  # two to six sequences may need it for their logits
    if is_prepared:
        decoder.prepare()
    assert head.is_packed == is_prepared
    found = [decoder.admit(prompt, GREEDY, seed=0) for prompt in prompts]
    while decoder.running:
        decoder.step()
    assert [sequence.ids for sequence in found] == expected
    assert head.is_packed


@pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")
@pytest.mark.usefixtures("huge_heads")
def test_one_that_diverges_beside_others_with_a_packed_head() -> None:
    """A prompt's token has an embedding that overflows."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = float("inf")
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.float32, slots=3, max_length=40)
    decoder.prepare()
    expected = [sequence.ids for sequence in decoded(decoder, [[1, 2, 3], [7, 8]])]
    first, bad, last = (decoder.admit(prompt, GREEDY, seed=0) for prompt in ([1, 2, 3], [5], [7, 8]))
    while not all(sequence.continuation for sequence in (first, bad, last)):
        decoder.step()
    bad.ids[-1] = 11  # as if it had been the likeliest
    decoder._rows.token_S[bad.slot] = 11
    while decoder.running:
        decoder.step()
    assert bad.finish_reason == "diverged"
    assert [first.ids, last.ids] == expected


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_token_is_routed_as_in_training(options: dict[str, Any]) -> None:
    config = tiny_config(**options)
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 30.0, 300.0):
        logits_TE = scale * torch.randn(200, config.n_routed_experts, generator=generator)
        bias_E = 0.1 * torch.randn(config.n_routed_experts, generator=generator)
        expected = routing_of(config, logits_TE.double(), bias_E.double())
        for token, logits_E in enumerate(logits_TE.numpy()):
            with np.errstate(over="ignore"):
                experts_K, weights_K = routed(config, logits_E, bias_E.numpy())
            if scale == 1.0:  # beyond it scores of 0 and 1 are equal in float32
                assert experts_K.tolist() == expected.experts_TK[token].tolist()
            weights_E = expected.scores_TE[token, experts_K]
            if config.norm_topk_prob:
                weights_E = weights_E / weights_E.sum().clamp_min(1e-20)
            np.testing.assert_allclose(weights_K, weights_E * config.routed_scaling_factor, rtol=1e-4, atol=1e-20)
            assert weights_K.dtype == np.float32
        logits_E[2] = np.nan
        with np.errstate(over="ignore", invalid="ignore"):
            _, weights_K = routed(config, logits_E, bias_E.numpy())
        assert np.isnan(weights_K).any(), "a token that has diverged stays so"


@pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")
@pytest.mark.parametrize("are_large", [False, True])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_model_in_bfloat16(options: dict[str, Any], are_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights as they are stored and float32 elsewhere, prompts included: as exact as a model in float32.

    `are_large` as products in float16.
    """
    if are_large:
        monkeypatch.setattr(cpu, "LARGE", 0)
        monkeypatch.setattr(cpu, "MEDIUM", 0)
        monkeypatch.setattr(cpu_layers, "TOGETHER", 0)
    model = tiny_model(**options)
    store_in(model, torch.bfloat16)
    double = tiny_model(**options)
    double.load_state_dict(model.state_dict())
    double = double.double()
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.bfloat16, slots=3, max_length=40)
    steps = decoder._steps
    assert isinstance(steps, CpuSteps)
    assert isinstance(steps.head, Float16Matrix) == are_large
    for prompts in ([[1, 2, 3], [5] * 17, [7, 8]], [[9, 10]]):
        assert_exact(decoder, double, prompts)


@pytest.mark.skipif(not has_float16_products(), reason="no FBGEMM here")
def test_it_is_near_the_forward_pass_of_training() -> None:
    """That rounds activations to 8 bits some twenty times on the way to a logit, each time by 2^-9 at most.

    Of logits with a deviation of 0.6 a random walk of these is √20 · 2^-9 · 0.6 = 0.005; six times that is allowed.
    """
    model = tiny_model()
    store_in(model, torch.bfloat16)
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.bfloat16, slots=3, max_length=40)
    for sequence, tokens in decoded(decoder, [[1, 2, 3], [5] * 17, [7, 8]]).items():
        with torch.no_grad():
            output = model(torch.tensor([sequence.ids]), dtype=torch.bfloat16)
            logs_SV = model.logits(output.hidden_BSH[0]).log_softmax(-1)
        for place, (value, _) in enumerate(tokens, sequence.prompt_length):
            assert value == pytest.approx(logs_SV[place - 1, sequence.ids[place]].item(), abs=0.03)


def test_without_fbgemm_bfloat16_runs_on_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p828.model.backend.has_float16_products", lambda: False)
    model = tiny_model()
    store_in(model, torch.bfloat16)
    decoder = Decoder(model, VOCABULARY, VOCABULARY, torch.bfloat16, slots=3, max_length=40)
    assert type(decoder._steps) is PlainSteps
    assert decoder._cache.keys[0].dtype == torch.bfloat16
    assert all(tokens for tokens in decoded(decoder, [[1, 2, 3]]).values())
