"""The model that an export carries as code gives p828's logits and gradients."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_export import IMPLEMENTATIONS, TOLERANCE, VARIANTS, YARN, in_memory, like, load, own_tensors, write_own_export
from torch import Tensor
from transformers import DynamicCache

from oracles import assert_near, naive_activation, naive_attention, naive_experts, naive_routing
from p828.config import ModelConfig, RopeScaling
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer
from tiny import make_documents, tiny_config, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits(variant: str, tmp_path: Path) -> None:
    """Past the original context, with YaRN."""
    model = tiny_model(**VARIANTS[variant])
    tokens = torch.randint(97, (2, 47))
    expected = like(model, tokens)
    assert expected.std() > 0.1
    directory = write_own_export(model, tmp_path / "model")
    hub = load(directory)
    for implementation in IMPLEMENTATIONS:
        hub.set_attn_implementation(implementation)
        assert_near(hub(tokens).logits, expected, TOLERANCE)


@torch.no_grad()
def test_a_router_whose_scores_all_underflow(export: Path) -> None:
    """The weights are then zero, and not zero by zero."""
    model = tiny_model()
    for layer in model.layers:  # every expert's logit is minus the norm's first feature, which is large
        layer.mlp.gate.weight.zero_()[:, 0] = -1e5
        layer.post_attention_layernorm.weight[0] = 1e3
    model.model.embed_tokens.weight[:, 0] = 1.0
    tokens = torch.randint(97, (1, 9))
    scores: list[Tensor] = []
    hook = model.layers[0].mlp.gate.register_forward_hook(lambda _, __, routing: scores.append(routing.scores_TE))
    expected = like(model, tokens)
    hook.remove()
    assert (scores[0] == 0).any(dim=1).all()
    assert_near(in_memory(model, export)(tokens).logits, expected, TOLERANCE)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 3))
    experts = groups * draw(st.integers(2 if groups > 1 else 1, 5))
    kept = draw(st.integers(1, groups))
    kv_heads = draw(st.integers(1, 3))
    return tiny_config(
        vocab_size=97,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 6, 8])),
        use_qk_norm=draw(st.booleans()),
        attention_sinks=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(st.sampled_from([RopeScaling(), YARN, RopeScaling(1.5, 8, 4.0, 0.5)])),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(0, 2)),
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, experts // groups * kept)),
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 0.5, 2.5])),
        hidden_act=draw(st.sampled_from(["swiglu", "swiglu_of_product"])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(config=configs(), implementation=st.sampled_from(IMPLEMENTATIONS), length=st.integers(1, 40))
@settings(max_examples=25)
def test_logits_of_any_configuration(export: Path, config: ModelConfig, implementation: str, length: int) -> None:
    model = tiny_model(**vars(config))
    tokens = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        actual = in_memory(model, export, implementation)(tokens).logits
    assert_near(actual, like(model, tokens), TOLERANCE)


def naive_logits(tensors: dict[str, Tensor], config: ModelConfig, tokens_S: Tensor) -> Tensor:
    """The model once more in float64, from the names that an export has: one token, head and expert at a time."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    positions_S1 = torch.arange(len(tokens_S), dtype=torch.float64)[:, None]
    pair = torch.arange(config.head_dim // 2, dtype=torch.float64)
    turn_SD = torch.polar(
        torch.ones((), dtype=torch.float64), positions_S1 * config.rope_theta ** (-2 * pair / config.head_dim)
    )

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rotated(x_SND: Tensor) -> Tensor:
        turned = torch.complex(*x_SND.chunk(2, dim=-1)) * turn_SD[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    x_SH = weights["model.embed_tokens.weight"][tokens_S]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        normed_SH = norm(x_SH, f"{layer}.input_layernorm.weight")
        q, k, v = (
            (normed_SH @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
            for name in "qkv"
        )
        sinks = weights[f"{layer}.self_attn.sinks"]
        attended = naive_attention(rotated(q)[None], rotated(k)[None], v[None], sinks, torch.zeros(1, len(tokens_S)))
        x_SH = x_SH + attended[0].flatten(1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        normed_SH = norm(x_SH, f"{layer}.post_attention_layernorm.weight")
        logits_SE = normed_SH @ weights[f"{layer}.mlp.gate.weight"].T
        bias = weights[f"{layer}.mlp.gate.e_score_correction_bias"].tolist()
        chosen = [naive_routing(config, row, bias) for row in logits_SE.tolist()]
        gate, up = weights[f"{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        routed = naive_experts(
            config.hidden_act,
            normed_SH,
            torch.tensor([list(c) for c in chosen]),
            torch.tensor([list(c.values()) for c in chosen], dtype=torch.float64),
            gate,
            up,
            weights[f"{layer}.mlp.experts.down_proj"],
        )
        gate, up, down = (weights[f"{layer}.mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        shared = torch.stack([down @ naive_activation(config.hidden_act, gate @ x, up @ x) for x in normed_SH])
        x_SH = x_SH + routed + shared
    return norm(x_SH, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
@torch.no_grad()
def test_logits_of_a_naive_model_in_float64(hidden_act: str, export: Path) -> None:
    model = tiny_model(hidden_act=hidden_act, n_group=2, topk_group=1, routed_scaling_factor=1.5)
    tokens = torch.randint(97, (1, 13))
    expected = naive_logits(own_tensors(model), model.config, tokens[0])
    for implementation in IMPLEMENTATIONS:
        actual = in_memory(model, export, implementation)(tokens).logits[0]
        assert_near(actual, expected, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sinks", [True, False])
@torch.no_grad()
def test_padding_on_the_left(implementation: str, sinks: bool, export: Path) -> None:
    """With positions from the first token on, as `generate` gives them, and with those of the padded row."""
    model = tiny_model(attention_sinks=sinks)
    tokens = torch.randint(97, (3, 12))
    padding = [0, 5, 11]
    mask = torch.arange(12) >= torch.tensor(padding)[:, None]
    hub = in_memory(model, export, implementation)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for inputs in ({}, {"position_ids": positions}):
        actual = hub(tokens, attention_mask=mask.long(), **inputs).logits
        assert actual.isfinite().all()
        for row, pad in enumerate(padding):
            assert_near(actual[row, pad:], like(model, tokens[row : row + 1, pad:])[0], TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_documents_packed_into_a_row(implementation: str, model: Transformer, export: Path) -> None:
    """Positions that begin anew tell transformers where a document begins."""
    documents, positions = make_documents([[5, 7], [1, 11]])
    tokens = torch.randint(97, (2, 12))
    expected = like(model, tokens, positions_BS=positions, document_ids_BS=documents)
    actual = load(export, implementation)(tokens, position_ids=positions, use_cache=False).logits
    assert_near(actual, expected, TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["sinks and a shared expert", "product", "norms, softmax", "tied"])
def test_loss_and_gradients(variant: str, implementation: str, checkpointing: bool, export: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    tokens = torch.randint(97, (2, 9))
    hidden = model(tokens).hidden_BSH[:, :-1].flatten(0, 1)
    expected = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten()) / 16
    expected.backward()
    hub = in_memory(model, export, implementation).train()
    cache = DynamicCache(config=hub.config) if checkpointing else None  # a layer that runs twice may not append to it
    if checkpointing:
        hub.gradient_checkpointing_enable()
    loss = hub(tokens, labels=tokens, past_key_values=cache).loss
    loss.backward()
    assert_near(loss, expected, TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in hub.named_parameters()}
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert_near(gradients[name] * 16, parameter.grad * 16, 2e-5)  # forward and back


def test_flex_attention_has_no_gradients_on_a_cpu(export: Path) -> None:
    """PyTorch says so; the model does not go on without them."""
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        load(export, "flex_attention")(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
