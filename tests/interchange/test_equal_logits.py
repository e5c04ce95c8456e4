"""An exported model gives the same logits in transformers, in float32 within 1e-5 of the largest logit.

Both sides round to float32 at other places. Each sum's error is some 1e-7 of its terms, and passes through norms and
products of a few layers: 1e-5 leaves room for a factor of ten beyond what is measured.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import p828
from exported import EOS, compare, difference, in_transformers, letters, load, logits, save_model
from p828.config import RopeScaling
from p828.errors import ConfigError
from p828.interchange.architecture import has_reversed_ramp
from p828.interchange.export import export_model
from p828.interchange.own import to_config as own_to_config
from p828.interchange.remote_code.configuration_p828 import P828Config
from runs import run_config
from tiny import tiny_config, tiny_model

TOLERANCE = 1e-5
GLM4_MOE: dict[str, Any] = {"attention_sinks": False}
MIMO: dict[str, Any] = {"n_shared_experts": 0}
YARN = {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16)}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("glm4_moe", GLM4_MOE),
    "glm4_moe, norms on q and k": ("glm4_moe", {**GLM4_MOE, "use_qk_norm": True}),
    "glm4_moe, groups": ("glm4_moe", {**GLM4_MOE, "n_group": 4, "topk_group": 2}),
    "glm4_moe, raw weights, scaled": ("glm4_moe", {**GLM4_MOE, "norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    "glm4_moe, two shared": ("glm4_moe", {**GLM4_MOE, "n_shared_experts": 2}),
    "glm4_moe, none shared": ("glm4_moe", {**GLM4_MOE, "n_shared_experts": 0, "use_qk_norm": True}),
    "glm4_moe, all": (
        "glm4_moe",
        {**GLM4_MOE, **YARN, "use_qk_norm": True, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    ),
    "glm4_moe, top 1 of 64": ("glm4_moe", {**GLM4_MOE, "n_routed_experts": 64, "num_experts_per_tok": 1}),
    "glm4_moe, tied, YaRN": ("glm4_moe", {**GLM4_MOE, **YARN, "tie_word_embeddings": True}),
    "own": ("p828", {}),
    "own, softmax, groups": ("p828", {"scoring_func": "softmax", "n_group": 4, "topk_group": 2}),
    "own, top 1 of 64": ("p828", {"n_routed_experts": 64, "num_experts_per_tok": 1}),
    "own, product, tied, YaRN": ("p828", {**YARN, "hidden_act": "swiglu_of_product", "tie_word_embeddings": True}),
    "own, one expert, norms on q and k": (
        "p828",
        {"n_routed_experts": 1, "num_experts_per_tok": 1, "use_qk_norm": True},
    ),
    "mimo": ("mimo_v2_flash", MIMO),
    "mimo, groups": ("mimo_v2_flash", {**MIMO, "n_group": 2, "topk_group": 1}),
    "mimo, top 1 of 64": ("mimo_v2_flash", {**MIMO, "n_routed_experts": 64, "num_experts_per_tok": 1}),
    "mimo, tied, YaRN": ("mimo_v2_flash", {**MIMO, **YARN, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_random_weights_past_the_original_context(variant: str, tmp_path: Path) -> None:
    """With YaRN four times as far as its frequencies were trained for: the whole context of 64."""
    model_type, changes = VARIANTS[variant]
    model = tiny_model(**changes)
    theirs = in_transformers(model, tmp_path)
    assert theirs.config.model_type == model_type
    tokens = torch.randint(97, (2, 64))
    assert logits(model, tokens).std() > 0.1
    found = compare(model, theirs, tokens)
    assert found.difference < TOLERANCE
    assert found.ties == 0


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from([2, 4, 6, 8, 64]))
    groups = draw(st.sampled_from([1, *(n for n in (2, 3) if experts % n == 0 and experts // n > 1)]))
    kept = draw(st.integers(1, groups))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "vocab_size": draw(st.integers(90, 130)),
        "hidden_size": draw(st.sampled_from([8, 32, 40])),
        "moe_intermediate_size": draw(st.sampled_from([4, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 8, 16])),
        "use_qk_norm": draw(st.booleans()),
        "attention_sinks": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([2.0, 100.0, 10_000.0, 1e6])),
        "rope_scaling": RopeScaling(draw(st.sampled_from([1.0, 1.5, 8.0])), draw(st.sampled_from([4, 16, 64, 10**6]))),
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.integers(0, 2)),
        "num_experts_per_tok": draw(st.integers(1, min(experts // groups * kept, 6))),
        "n_group": groups,
        "topk_group": kept,
        "scoring_func": draw(st.sampled_from(["sigmoid", "sigmoid", "softmax"])),
        "hidden_act": draw(st.sampled_from(["swiglu", "swiglu", "swiglu", "swiglu_of_product"])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=25)
@given(configurations().filter(lambda changes: not has_reversed_ramp(tiny_config(**changes))), st.integers(0, 2**32))
@torch.no_grad()
def test_any_configuration(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], seed: int) -> None:
    model = tiny_model(**changes)
    tokens = torch.randint(changes["vocab_size"], (3, 30), generator=torch.Generator().manual_seed(seed))
    theirs = in_transformers(model, tmp_path_factory.mktemp("drawn"))
    found = compare(model, theirs, tokens)
    assert found.difference < TOLERANCE
    assert found.ties <= 1  # one in some ten thousand rows


@pytest.mark.parametrize(
    "theta, head_dim, context", [(10.0, 8, 131_072), (100.0, 64, 4)], ids=["above every pair", "below every pair"]
)
def test_a_ramp_of_yarn_that_transformers_takes_otherwise_is_refused(
    theta: float, head_dim: int, context: int, tmp_path: Path
) -> None:
    """The frequencies are not the same there; one step further they are."""
    for original, is_reversed in ((context, True), (2048, False)):
        scaling = RopeScaling(4.0, original)
        model = tiny_model(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
        theirs = P828Config(**own_to_config(model.config))
        expected = ROPE_INIT_FUNCTIONS["yarn"](theirs)[0]
        assert torch.allclose(model.frequencies, expected) != is_reversed
        run = save_model(tmp_path / str(original), model)
        with pytest.raises(ConfigError, match="rope_scaling") if is_reversed else nullcontext():
            export_model(run, tmp_path / "export")


@pytest.fixture(scope="module", params=[GLM4_MOE, MIMO, {}], ids=["glm4_moe", "mimo", "own"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> p828.Run:
    """A run of 12 steps, exported beside its directory."""
    tmp_path = tmp_path_factory.mktemp("trained")
    run = p828.train_run(run_config(tmp_path, model=request.param, train={"seed": 3}))
    export_model(run.path, tmp_path / "export")
    return run


@torch.no_grad()
def test_trained_weights_with_padding_on_the_left(trained: p828.Run) -> None:
    """As `generate` pads prompts of several lengths; each row's logits are those of the row alone."""
    exported = trained.path.parents[1] / "export"
    theirs, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    texts = ["abc def", "jih gfe dcba abc, abc def ghi"]
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    found = theirs(**padded).logits
    for row, text in enumerate(texts):
        ids = trained.tokenizer.encode(text)
        assert padded["input_ids"][row, -len(ids) :].tolist() == ids
        expected = logits(trained.model, torch.tensor([ids]))[0]
        assert difference(found[row, -len(ids) :], expected) < TOLERANCE
    assert padded["attention_mask"][0, 0] == 0


def test_greedy_continuation(trained: p828.Run) -> None:
    """With the cache of either side, and the end token that either stops at."""
    exported = trained.path.parents[1] / "export"
    theirs, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("abc def", return_tensors="pt")
    continued = theirs.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = trained.generate("abc def", max_new_tokens=30, temperature=0)
    assert [tokenizer.decode(continued, skip_special_tokens=True)] == expected


def gradients(model: torch.nn.Module, out: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    out.backward(upstream)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [GLM4_MOE, MIMO, {}], ids=["glm4_moe", "mimo", "own"])
def test_gradients(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    theirs = in_transformers(model, tmp_path)
    tokens, upstream = torch.randint(97, (2, 9)), torch.randn(2, 9, 97)
    expected = gradients(theirs, theirs(tokens).logits, upstream)
    actual = gradients(model, model.logits(model(tokens).hidden_BSH), upstream)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert difference(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("changes", [GLM4_MOE, MIMO, {}], ids=["glm4_moe", "mimo", "own"])
@torch.no_grad()
def test_bfloat16_is_float32_rounded(changes: dict[str, Any], tmp_path: Path) -> None:
    """The matrices as training computes with them; what training keeps in float32 is float32 in the file."""
    model = tiny_model(**changes)
    run = save_model(tmp_path / "run", model)
    export_model(run, tmp_path / "export", "bfloat16")
    theirs = load(tmp_path / "export", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.ndim > 1 and "gate.weight" not in name
        assert torch.equal(theirs[name], tensor.bfloat16().float() if is_matrix else tensor), name
    as_it_is = load(tmp_path / "export")
    assert as_it_is.dtype == torch.bfloat16
    assert as_it_is.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    tokens = torch.randint(97, (4, 40))
    found, expected = as_it_is(tokens).logits.float(), logits(model, tokens)
    assert math.isfinite(found.sum())
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98


def test_a_vocabulary_of_more_rows_than_the_tokenizer_has(tmp_path: Path) -> None:
    theirs = in_transformers(tiny_model(**GLM4_MOE, vocab_size=128), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (theirs.config.vocab_size, len(tokenizer)) == (128, letters().vocab_size)
    assert tokenizer.eos_token == EOS
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    assert theirs.config.pad_token_id is None
