"""The same weights in transformers' models give the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from oracles import assert_near
from p828.config import ModelConfig, RopeScaling
from p828.model.attention import Attention, AttentionMask
from p828.model.rope import inverse_frequencies, rotary
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
# Both sides are float32 and round at other places; through two layers and the head, errors of single parts (3e-6 with
# sums of at most a hundred terms, tests/oracles.py) pass through norms and products some ten times.
TOLERANCE = 2e-5

GLM: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk norm": {"use_qk_norm": True},
    "groups": {"n_group": 4, "topk_group": 2},
    "raw weights, scaled": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "two shared": {"n_shared_experts": 2},
    "yarn": {"rope_scaling": YARN},
    "tied": {"tie_word_embeddings": True},
    "all": {"use_qk_norm": True, "n_group": 2, "topk_group": 1, "rope_scaling": YARN, "routed_scaling_factor": 2.5},
}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling.factor == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
        "factor": config.rope_scaling.factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_position_embeddings,
        "beta_fast": config.rope_scaling.beta_fast,
        "beta_slow": config.rope_scaling.beta_slow,
    }


def to_glm(model: Transformer) -> Glm4MoeForCausalLM:
    config = model.config
    same = (
        "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "use_qk_norm", "max_position_embeddings", "n_routed_experts",
        "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
        "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    glm_config = Glm4MoeConfig(
        **{name: getattr(config, name) for name in same},
        first_k_dense_replace=0,
        num_mtp_layers=0,
        rope_parameters=rope_parameters(config),
        attn_implementation="eager",
    )
    glm = Glm4MoeForCausalLM(glm_config).eval()
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    glm.load_state_dict(state)
    return glm


@pytest.mark.parametrize("variant", GLM)
@torch.no_grad()
def test_glm4_moe_logits(variant: str) -> None:
    model = tiny_model(attention_sinks=False, **GLM[variant])
    tokens = torch.randint(97, (2, 23))
    expected = to_glm(model)(tokens).logits
    actual = model.logits(model(tokens).hidden_BSH)
    assert expected.std() > 0.1
    assert_near(actual, expected, TOLERANCE)


def test_glm4_moe_gradients() -> None:
    model = tiny_model(attention_sinks=False, use_qk_norm=True, n_group=4, topk_group=2)
    glm = to_glm(model)
    tokens = torch.randint(97, (2, 9))
    upstream = torch.randn(2, 9, 97)
    glm(tokens).logits.backward(upstream)
    model.logits(model(tokens).hidden_BSH).backward(upstream)
    theirs = dict(glm.named_parameters())
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, theirs[name].grad, TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "flash_cpu"])
@pytest.mark.parametrize("scaling", [RopeScaling(), YARN], ids=["rope", "yarn"])
def test_gpt_oss_attention_with_sinks(backend: str, scaling: RopeScaling) -> None:
    config = tiny_config(rope_scaling=scaling)
    ours = Attention(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.2)
    gpt_oss_config = GptOssConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_types=["full_attention"],
        attention_bias=False,
        attn_implementation="eager",
    )
    theirs = GptOssAttention(gpt_oss_config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())

    batch, length = 2, 19
    x, upstream = torch.randn(2, batch, length, config.hidden_size).unbind()
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
    cos, sin = rotary(torch.arange(length).expand(batch, -1), frequencies, scaling.factor)

    def gradients(module: torch.nn.Module, out: Tensor) -> dict[str, Tensor | None]:
        out.backward(upstream)
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    actual = ours(x, (cos, sin), AttentionMask(backend, None, None))
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected, _ = theirs(x, (cos[:, :, 0], sin[:, :, 0]), causal)
    assert_near(actual, expected, TOLERANCE)
    our_gradients, their_gradients = gradients(ours, actual), gradients(theirs, expected)
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in our_gradients.items():
        assert_near(gradient, their_gradients[name], TOLERANCE)
    assert their_gradients["sinks"] is not None
    assert their_gradients["sinks"].norm() > 1e-2
