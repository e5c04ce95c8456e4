"""What vLLM's Transformers backend asks of a model's code, rule by rule.

The rules are those of `vllm/model_executor/models/transformers` in vLLM 0.33, which is not run here. It traces the code
with torch.fx, or reads its source, and replaces what it knows.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from own_export import like, write_own_export
from torch import Tensor, fx, nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.activations import ACT2FN

from oracles import assert_near
from p828.model.attention import reference_attention
from p828.model.transformer import Transformer
from tiny import tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "sinks and a shared expert": {},
    "groups, norms, softmax": {"n_group": 2, "topk_group": 1, "use_qk_norm": True, "scoring_func": "softmax"},
    "raw weights, no shared expert, no sinks": {
        "norm_topk_prob": False, "n_shared_experts": 0, "attention_sinks": False, "scoring_func": "softmax",
    },
}  # fmt: skip


def vllm_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, marker: str = "", **arguments: Any
) -> tuple[Tensor, None]:
    """As vLLM's own: scale and sinks come from the module, tokens and their heads are flat, and there is no mask."""
    assert mask is None
    assert marker == "from the caller"
    assert arguments["s_aux"] is module.sinks
    assert isinstance(module.sinks, nn.Parameter | None)
    assert module.scaling == pytest.approx(query.shape[-1] ** -0.5)
    assert isinstance(module.layer_idx, int)
    rows = (x.transpose(1, 2) for x in (query, key, value))
    attended = reference_attention(*rows, module.sinks, None)
    return attended.reshape(query.shape[2], -1), None


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The newest vLLM is installed, and its attention known to transformers."""
    install(monkeypatch, tmp_path / "site", "0.33.0")
    AttentionInterface.register("vllm", vllm_attention)
    yield
    AttentionInterface._global_mapping.pop("vllm")


def install(monkeypatch: pytest.MonkeyPatch, site: Path, version: str) -> None:
    """No more of vLLM than what a package says of itself."""
    metadata = site / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))


def served(model: Transformer, directory: Path) -> Any:
    """The model as vLLM makes it: its configuration through AutoConfig, `vllm` as attention, without a head."""
    path = write_own_export(model, directory)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True, attn_implementation="vllm")
    return AutoModel.from_pretrained(path, config=config, trust_remote_code=True).eval()


class LeafTracer(fx.Tracer):
    """Keeps every submodule one node, so that a module's own forward is seen."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def above(node: fx.Node) -> set[fx.Node]:
    """All nodes that it is computed from."""
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        if (last := pending.pop()) not in found:
            found.add(last)
            pending += last.all_input_nodes
    return found


def is_call(node: fx.Node, name: str) -> bool:
    return node.op in ("call_method", "call_function") and getattr(node.target, "__name__", node.target) == name


def forward_source(module: nn.Module) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_with_attention_of_the_caller(variant: str, tmp_path: Path) -> None:
    """Keyword arguments go down to attention, and what vLLM calls with positions of its own comes out."""
    model = tiny_model(**VARIANTS[variant])
    hub = served(model, tmp_path / "model")
    tokens = torch.randint(97, (1, 11))
    positions = torch.arange(11)[None]
    inputs = {"position_ids": positions, "use_cache": False, "return_dict": False, "marker": "from the caller"}
    for given in ({"input_ids": tokens}, {"inputs_embeds": hub.get_input_embeddings()(tokens)}):
        hidden = hub(**given, **inputs)[0]
        assert_near(model.logits(hidden), like(model, tokens), 1e-5)


@pytest.mark.usefixtures("_vllm")
def test_the_classes_are_found(tmp_path: Path) -> None:
    """The configuration before the models, since vLLM imports in the order of `auto_map`; it asks AutoModel alone."""
    hub = served(tiny_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert list(config["auto_map"])[:2] == ["AutoConfig", "AutoModel"]
    assert type(hub).is_backend_compatible()
    assert hub.base_model_prefix == "model"
    assert hub.get_decoder() is hub
    assert hub.config.n_routed_experts == 8  # the fields by which it knows a mixture of experts, and its sizes
    assert hub.config.num_experts_per_tok == 3
    assert hub.config.moe_intermediate_size == 24


@pytest.mark.usefixtures("_vllm")
def test_one_call_of_the_attention_interface(tmp_path: Path) -> None:
    """Its name comes from ALL_ATTENTION_FUNCTIONS; scale and sinks stand in the call, as the module's attributes."""
    attention = served(tiny_model(), tmp_path / "model").layers[0].self_attn
    forward = forward_source(attention)
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    names = {
        target.id
        for node in assigned
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    assert len(calls) == 1
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert keywords == {"scaling": "self.scaling", "s_aux": "self.sinks", None: "kwargs"}
    projections = [ast.unparse(node) for node in ast.walk(forward) if isinstance(node, ast.Call)]
    for name in "qkv":
        assert projections.count(f"self.{name}_proj(hidden_states)") == 1


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_router(variant: str, tmp_path: Path) -> None:
    """Weight and bias alone; the last top-k is of one score of one linear layer, in float32."""
    config = tiny_model(**VARIANTS[variant])
    gate = served(config, tmp_path / "model").layers[0].mlp.gate
    assert {name for name, _ in gate.named_parameters()} == {"weight"}
    assert {name for name, _ in gate.named_buffers()} == {"e_score_correction_bias"}
    graph = LeafTracer().trace(gate)
    topk = [node for node in graph.nodes if is_call(node, "topk")][-1]
    scorers = [node for node in above(topk) if is_call(node, "sigmoid") or is_call(node, "softmax")]
    assert [is_call(node, config.config.scoring_func) for node in scorers] == [True]
    assert any(is_call(node, "linear") for node in above(scorers[0]))
    casts = [node for node in above(scorers[0]) if is_call(node, "type")]
    assert {node.args[1] for node in casts} == {torch.float32}
    (output,) = (node for node in graph.nodes if node.op == "output")
    logits, weights, indices = output.args[0]
    assert is_call(logits, "linear")
    assert topk in above(weights)
    assert topk in above(indices) | {indices}
    is_normalised = any(is_call(node, "truediv") for node in above(weights))
    assert is_normalised == config.config.norm_topk_prob


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_block_and_its_experts(variant: str, tmp_path: Path) -> None:
    """experts(x, ids, weights) + shared(x), with (_, weights, ids) = gate(x) and nothing else; one tensor."""
    model = tiny_model(**VARIANTS[variant])
    hub = served(model, tmp_path / "model")
    block = hub.layers[0].mlp
    assert all(parameter.ndim == 3 for parameter in block.experts.parameters())
    assert {name: tuple(p.shape) for name, p in block.experts.named_parameters()} == {
        "gate_up_proj": (8, 48, 32),
        "down_proj": (8, 32, 24),
    }
    assert not block.experts.is_transposed
    assert not block.experts.has_bias
    assert list(inspect.signature(block.experts.forward).parameters) == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]
    assert not any(
        isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(forward_source(block))
    )
    graph = LeafTracer().trace(block)
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    shared = {"shared_experts"} if model.config.n_shared_experts else set()
    assert set(calls) == {name for name, _ in block.named_children()} == {"gate", "experts"} | shared
    _, ids, weights = calls["experts"].args
    assert (ids.args, weights.args) == ((calls["gate"], 2), (calls["gate"], 1))
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert is_call(output.args[0], "add") == bool(shared)

    class Replaced(nn.Module):
        """Experts of another library, in the place of ours."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return experts(hidden_states, top_k_index, top_k_weights)

    tokens = torch.randn(1, 5, 32)
    expected = block(tokens)
    experts = block.experts
    block.experts = Replaced()
    assert torch.equal(block(tokens), expected)


@pytest.mark.usefixtures("_vllm")
def test_the_shared_expert(tmp_path: Path) -> None:
    """act(gate(x)) * up(x) with an activation that is a module, then down."""
    shared = served(tiny_model(), tmp_path / "model").layers[0].mlp.shared_experts
    graph = LeafTracer().trace(shared)
    assert [(node.op, str(node.target)) for node in graph.nodes if node.op == "call_module"] == [
        ("call_module", name) for name in ("gate_proj", "act_fn", "up_proj", "down_proj")
    ]
    assert type(shared.act_fn) is type(ACT2FN["silu"])
    (product,) = (node for node in graph.nodes if is_call(node, "mul"))
    assert [node.target for node in product.args] == ["act_fn", "up_proj"]


@pytest.mark.usefixtures("_vllm")
def test_norms(tmp_path: Path) -> None:
    """x * rsqrt(mean(x²) + eps) with eps in an attribute; the weight last."""
    norm = served(tiny_model(rms_norm_eps=3e-4), tmp_path / "model").norm
    graph = LeafTracer().trace(norm)
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["hidden_states"]
    assert [name for name, value in vars(norm).items() if value == 3e-4] == ["variance_epsilon"]
    (root,) = (node for node in graph.nodes if is_call(node, "rsqrt"))
    assert {name for name in ("pow", "mean", "add") if any(is_call(node, name) for node in above(root))} == {
        "pow", "mean", "add",
    }  # fmt: skip


@pytest.mark.usefixtures("_vllm")
def test_experts_that_it_would_compute_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as 'swiglu', not as hidden_act = 'swiglu_of_product'"):
        served(tiny_model(hidden_act="swiglu_of_product"), tmp_path / "model")


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("version, is_refused", [("0.29.0", True), ("0.30.0rc1", True), ("0.30.0", False)])
def test_a_vllm_that_drops_sinks_is_refused(
    version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path / "older", version)
    served(tiny_model(attention_sinks=False), tmp_path / "without")
    if is_refused:
        with pytest.raises(ValueError, match=f"vLLM {version} would leave out this model's attention sinks"):
            served(tiny_model(), tmp_path / "model")
    else:
        served(tiny_model(), tmp_path / "model")
