"""The model that an export carries as code, in every way that transformers uses a model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from own_export import IMPLEMENTATIONS, TOLERANCE, VARIANTS, in_memory, like, load, own_tensors, write_own_export
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, StaticCache

from decoded import decoded
from oracles import BFLOAT16, assert_near
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

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
    expected = [sequence.continuation for sequence in decoded(model, PROMPTS, config)]
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
    with pytest.raises(ValueError, match="wrong with a static cache"):
        hub.generate(torch.tensor([[1, 2]]), cache_implementation="static", max_new_tokens=2, pad_token_id=0)


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


@torch.no_grad()
def test_weights_that_a_file_lacks_begin_anew(model: Transformer, tmp_path: Path) -> None:
    """As where a model gets sinks for further training: they begin at zero, and are reported as missing."""
    directory = write_own_export(model, tmp_path / "model")
    tensors = {name: t for name, t in own_tensors(model).items() if not name.endswith(("sinks", "experts.down_proj"))}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    hub, report = load(directory, output_loading_info=True)
    assert {name.split(".", 3)[-1] for name in report["missing_keys"]} == {"self_attn.sinks", "mlp.experts.down_proj"}
    for layer in hub.model.layers:
        assert (layer.self_attn.sinks == 0).all()
        assert layer.mlp.experts.down_proj.std() == pytest.approx(0.02, rel=0.05)


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
        with pytest.raises(ValueError, match="no continuous batching"):
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


@pytest.mark.long
@pytest.mark.parametrize("hidden_act", ["swiglu", "swiglu_of_product"])
def test_two_processes(hidden_act: str, tmp_path: Path) -> None:
    """Tensor parallelism, and expert parallelism with it: half of the heads, half of each expert or of the experts."""
    model = tiny_model(hidden_act=hidden_act)
    directory = write_own_export(model, tmp_path / "model")
    tokens = torch.randint(97, (2, 9))
    script, out = Path(__file__).with_name("parallel_logits.py"), tmp_path / "logits.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, directory]
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, *command, json.dumps(tokens.tolist()), out], env=environment, check=True)
    for result in (results := json.loads(out.read_text(encoding="utf-8"))):
        assert_near(torch.tensor(result["logits"]), like(model, tokens), TOLERANCE)
    # a product's halves need one another, so its experts are not cut
    rows = {"swiglu": [24, 48], "swiglu_of_product": [96, 96]}[hidden_act]
    assert results[0]["sizes"] == [[16, 32], [8, rows[0], 32]]
    assert results[1]["sizes"] == [[16, 32], [4, rows[1], 32]]
