"""The model that an export carries as code is p828's, in every way that transformers uses a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from own_export import like, load, own_tensors, write_own_export
from torch import Tensor
from transformers import AutoConfig, AutoModel, StaticCache

from oracles import BFLOAT16, assert_near, naive_activation, naive_attention, naive_experts, naive_routing
from p828.config import ModelConfig, RopeScaling
from p828.inference.decode import decode
from p828.inference.sampling import SamplingConfig
from p828.interchange.own import OWN
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer
from tiny import make_documents, tiny_config, tiny_model

# Both sides are float32; they add up in another order, through two layers.
TOLERANCE = 1e-5
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
VARIANTS: dict[str, dict[str, Any]] = {
    "sinks and a shared expert": {},
    "no sinks, softmax": {"attention_sinks": False, "scoring_func": "softmax"},
    "norms, softmax": {"use_qk_norm": True, "scoring_func": "softmax", "norm_topk_prob": False},
    "product": {"hidden_act": "swiglu_of_product", "n_shared_experts": 2},
    "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "top-1 of one group": {"num_experts_per_tok": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "many experts": {"n_routed_experts": 64, "num_experts_per_tok": 8, "n_shared_experts": 0},
    "a single expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "yarn": {"rope_scaling": YARN, "rope_theta": 500.0},
    "tied": {"tie_word_embeddings": True},
    "as many keys as queries": {"num_key_value_heads": 4},
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def _uncompiled() -> Any:
    """flex_attention's mask, which transformers would compile for ten seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def export(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_export(model, tmp_path_factory.mktemp("export") / "model")


def in_memory(model: Transformer, export: Path, implementation: str = "eager") -> Any:
    """The class that the export's code defines, with the weights of `model`."""
    loaded = AutoConfig.from_pretrained(export, trust_remote_code=True)
    config = type(loaded)(**OWN.to_config(model.config), attn_implementation=implementation)
    hub = type(load(export))(config).eval()
    missing, unexpected = hub.load_state_dict(own_tensors(model), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    hub.tie_weights()
    return hub


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
    if checkpointing:
        hub.gradient_checkpointing_enable()
    loss = hub(tokens, labels=tokens).loss
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


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [50], [9, 8]]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "implementation, cache",
    [("eager", "dynamic"), ("eager", "static"), ("sdpa", "dynamic"), ("sdpa", "static"), ("flex_attention", "dynamic")],
)
@pytest.mark.parametrize("variant", ["sinks and a shared expert", "no sinks, softmax", "yarn"])
def test_greedy_generation(variant: str, implementation: str, cache: str, export: Path) -> None:
    """Of a batch, as p828 decodes each prompt by itself; past the original context, with YaRN."""
    model = tiny_model(**VARIANTS[variant])
    with torch.no_grad():
        model.head_weight[96] = 0
    config = SamplingConfig(temperature=0.0, max_new_tokens=20)
    generators = [torch.Generator() for _ in PROMPTS]
    expected = [c.ids for c in decode(model, PROMPTS, config, generators, eos_id=96, vocab_size=97)]
    hub = in_memory(model, export, implementation)
    ids = hub.generate(
        **padded(PROMPTS), max_new_tokens=20, do_sample=False, cache_implementation=cache, pad_token_id=0
    )
    assert ids[:, len(PROMPTS[0]) :].tolist() == expected


def test_sampling(model: Transformer, export: Path) -> None:
    """A draw from the likeliest token alone is greedy; a seed decides the others."""
    hub, inputs = load(export, "sdpa"), padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    greedy = hub.generate(**inputs, do_sample=False, **options)
    assert torch.equal(hub.generate(**inputs, do_sample=True, top_k=1, **options), greedy)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(hub.generate(**inputs, do_sample=True, top_k=0, **options))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], greedy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_prompt_in_pieces(implementation: str, model: Transformer, export: Path) -> None:
    """Into a cache that grows, and into one of fixed size: the logits of a whole pass."""
    tokens = torch.randint(97, (2, 15))
    hub = load(export, implementation)
    caches = [None] if implementation == "flex_attention" else [None, StaticCache(hub.config, max_cache_len=24)]
    for cache in caches:
        found = []
        for piece in tokens.split([6, 1, 8], dim=1):
            output = hub(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        assert_near(torch.cat(found, dim=1), like(model, tokens), TOLERANCE)


def test_flex_attention_refuses_a_static_cache(export: Path) -> None:
    """In transformers its mask is wrong then, for every model."""
    hub = load(export, "flex_attention")
    with pytest.raises(ValueError, match="wrong with a static cache"):
        hub(torch.tensor([[1, 2]]), past_key_values=StaticCache(hub.config, max_cache_len=24))


@torch.no_grad()
def test_hidden_states_attentions_and_router_logits(model: Transformer, export: Path) -> None:
    tokens = torch.randint(97, (2, 6))
    output = load(export)(tokens, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    routings: list[Any] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, found: routings.append(found)) for layer in model.layers
    ]
    hidden = model(tokens).hidden_BSH
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == 3
    assert_near(output.hidden_states[0], model.embed(tokens, torch.float32), TOLERANCE)
    assert_near(output.hidden_states[-1], hidden, TOLERANCE)
    assert [a.shape for a in output.attentions] == [(2, 4, 6, 6)] * 2
    assert (output.attentions[0].sum(-1) < 1).all()  # the sink has the rest
    for found, routing in zip(output.router_logits, routings, strict=True):
        assert_near(found, routing.logits_TE, TOLERANCE)


@torch.no_grad()
def test_the_model_without_a_head(model: Transformer, export: Path) -> None:
    base = AutoModel.from_pretrained(export, trust_remote_code=True, attn_implementation="sdpa")
    assert type(base).__name__ == "P828Model"
    tokens = torch.randint(97, (2, 6))
    assert_near(base(tokens).last_hidden_state, model(tokens).hidden_BSH, TOLERANCE)
    embedded = base.get_input_embeddings()(tokens)
    assert_near(base(inputs_embeds=embedded).last_hidden_state, model(tokens).hidden_BSH, TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_several_files_and_a_device_map(tied: bool, tmp_path: Path) -> None:
    """Parts of the model may stay on disk."""
    model = tiny_model(tie_word_embeddings=tied)
    directory = write_own_export(model, tmp_path / "model", files=3)
    tokens = torch.randint(97, (2, 6))
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for device_map in ("auto", devices):
        hub = load(directory, "sdpa", device_map=device_map, offload_folder=tmp_path / "offloaded")
        assert_near(hub(tokens).logits, like(model, tokens), TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saved_and_loaded_again(tied: bool, tmp_path: Path) -> None:
    """Every bit, into several files, and the code along with it."""
    model = tiny_model(tie_word_embeddings=tied)
    first = load(write_own_export(model, tmp_path / "model"))
    first.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {
        "configuration_p828.py", "attention_p828.py", "modeling_p828.py",
    }  # fmt: skip
    second = load(tmp_path / "again")
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    base = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(base.norm.weight, first.model.norm.weight)


@torch.no_grad()
def test_bfloat16(model: Transformer, export: Path) -> None:
    """The router, its bias and the sinks stay float32, whatever the rest is in."""
    tokens = torch.randint(97, (2, 20))
    with torch.no_grad():
        expected = model.logits(model(tokens, dtype=torch.bfloat16).hidden_BSH)
    for implementation in IMPLEMENTATIONS:
        hub = load(export, implementation, dtype=torch.bfloat16)
        kept = {name for name, tensor in hub.state_dict().items() if tensor.dtype == torch.float32}
        assert {name.split(".", 3)[-1] for name in kept} == {
            "self_attn.sinks", "mlp.gate.weight", "mlp.gate.e_score_correction_bias",
        }  # fmt: skip
        # Both round in bfloat16, at other places, through two layers of two parts each.
        assert_near(hub(tokens).logits.float(), expected, 4 * BFLOAT16)


@torch.no_grad()
def test_new_weights(export: Path) -> None:
    """A model that is made from its configuration has initial weights, and a loaded one its buffers, from meta."""
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    fresh = AutoModel.from_config(config, trust_remote_code=True)
    layer = fresh.layers[0]
    assert layer.mlp.experts.down_proj.std() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.gate.weight.std() == pytest.approx(0.02, rel=0.2)
    assert (layer.self_attn.sinks == 0).all()
    assert (layer.mlp.gate.e_score_correction_bias == 0).all()
    assert torch.equal(fresh.rotary_emb.inv_freq, load(export).model.rotary_emb.inv_freq)


def test_what_would_drop_the_sinks_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        load(export, "flash_attention_2")

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> tuple[Tensor, None]:
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, is_causal=True)
        return attended.transpose(1, 2), None

    transformers.AttentionInterface.register("another", attend)
    try:
        with pytest.raises(ValueError, match=r"'another' does not apply this model's attention sinks"):
            load(export, "another")(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="not applied in continuous batching"):
            load(export, "sdpa")(torch.tensor([[1, 2]]), cache=object())
        model = tiny_model(attention_sinks=False)
        tokens = torch.tensor([[1, 2, 3]])
        without = load(write_own_export(model, tmp_path / "model"), "another")
        assert_near(without(tokens).logits, like(model, tokens), TOLERANCE)
    finally:
        transformers.AttentionInterface._global_mapping.pop("another")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "rope_type = 'linear'"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "whole heads"),
        ("hidden_act", "gelu", "hidden_act"),
        ("scoring_func", "tanh", "scoring_func"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    field: str, value: object, words: str, model: Transformer, tmp_path: Path
) -> None:
    directory = write_own_export(model, tmp_path / "model", **{field: value})
    with pytest.raises(Exception, match=words):
        AutoConfig.from_pretrained(directory, trust_remote_code=True)


def test_the_configuration_in_json(export: Path, tmp_path: Path) -> None:
    """What transformers saves again holds the same."""
    AutoConfig.from_pretrained(export, trust_remote_code=True).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    given = json.loads((export / "config.json").read_text())
    assert {name: saved[name] for name in given} == given


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiled(implementation: str, model: Transformer, export: Path) -> None:
    """In one graph, values and gradients, and with a cache of fixed size."""
    tokens = torch.randint(97, (2, 9))
    hub = load(export, implementation)
    expected = hub(tokens, labels=tokens, use_cache=False)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in hub.parameters()]
    hub.zero_grad()
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(hub, fullgraph=True)
        actual = compiled(tokens, labels=tokens, use_cache=False)
        actual.loss.backward()
        assert_near(actual.logits, expected.logits, TOLERANCE)
        for parameter, gradient in zip(hub.parameters(), gradients, strict=True):
            assert_near(parameter.grad, gradient, 2e-5)
        with torch.no_grad():
            cache = StaticCache(hub.config, max_cache_len=16)
            hub(tokens[:, :8], past_key_values=cache)
            last = compiled(tokens[:, 8:], past_key_values=cache).logits[:, -1]
        assert_near(last, expected.logits[:, -1], TOLERANCE)
