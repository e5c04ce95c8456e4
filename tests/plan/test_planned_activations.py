"""What a compiled layer keeps for its backward pass, as PyTorch's own partitioner decides it, beside the formulas.

The partitioner runs on the CPU: the layer is traced as on a GPU, and neither compiled nor run.
"""

import functools
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from p828.config import Config, ModelConfig
from p828.model import backend
from p828.model.attention import AttentionMask
from p828.model.precision import is_matrix
from p828.model.transformer import Layer
from p828.plan.activations import Sizes, kept, weight_gradients
from p828.plan.peak import LOSS_CHUNK_TOKENS, LOSS_COLUMNS, SEGMENTS
from runs import run_config

ROWS, LENGTH = 3, 160
SCALARS = 1024  # bytes of what the formulas leave out: sums over a batch, and constants
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "q/k norm, groups": {"use_qk_norm": True, "n_group": 4, "topk_group": 2},
    "product, no shared experts, no sinks": {
        "hidden_act": "swiglu_of_product", "n_shared_experts": 0, "attention_sinks": False,
    },
}  # fmt: skip


class Traced(Exception):
    """The layer need not go on."""


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers choose what they would on CUDA, whose operations can be traced without one."""
    for module in ("norm", "router"):
        monkeypatch.setattr(f"p828.model.{module}.uses_triton", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr("p828.model.router.router_chooses_in_triton", lambda device: True)
    monkeypatch.setattr("p828.model.experts.experts_backend", lambda *arguments: "triton")
    torch._dynamo.reset()


def configuration(tmp_path: Any, **model: Any) -> Config:
    sizes = {
        "hidden_size": 64, "moe_intermediate_size": 40, "head_dim": 24, "num_attention_heads": 6,
        "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 1,
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    return run_config(tmp_path, model={**sizes, **model}, data={"sequence_length": LENGTH})


def bytes_kept(model: ModelConfig, recomputes: bool, has_auxiliary_losses: bool) -> int:
    """Of tensors that the forward pass makes and the backward pass reads; a storage counts once."""
    layer = Layer(model)
    layer.gradient_checkpointing, layer.auxiliary_losses = recomputes, has_auxiliary_losses
    for name, parameter in layer.named_parameters():
        if is_matrix(name, parameter.ndim):
            parameter.data = parameter.data.bfloat16()
    found: list[int] = []

    def look(graph: fx.GraphModule, arguments: Any) -> None:
        found.append(kept_by(graph, num_results=5 if has_auxiliary_losses else 3))
        raise Traced

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    layer.compile(backend=aot_autograd(fw_compiler=look, partition_fn=partition, decompositions=select_decomp_table()))
    x_BSH = torch.empty(ROWS, LENGTH, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    angles = tuple(torch.empty(ROWS, LENGTH, 1, model.head_dim // 2) for _ in range(2))
    bounds = [torch.empty(ROWS * LENGTH, dtype=torch.int32) for _ in range(2)]
    valid_T = torch.empty(ROWS * LENGTH, dtype=torch.bool)
    delta_BSH = torch.empty_like(x_BSH).requires_grad_()
    with pytest.raises(BackendCompilerFailed, match="Traced"):
        layer(x_BSH, delta_BSH, angles, AttentionMask("flash_triton", None, *bounds), valid_T, valid_T)
    (only,) = found
    return only


def kept_by(graph: fx.GraphModule, num_results: int) -> int:
    """The residual stream, the first result, is kept too."""
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    storages = {root(node): node for node in (results[0], *results[num_results:])}
    made = [node.meta["val"] for origin, node in storages.items() if origin.op != "placeholder"]
    return sum(value.numel() * value.element_size() for value in made)


def root(node: fx.Node) -> fx.Node:
    """The node that made the storage which this one views."""
    views = ("view", "alias", "permute", "slice", "t", "transpose")
    while node.op == "call_function" and str(node.target).removeprefix("aten.").split(".")[0] in views:
        node = node.args[0]  # type: ignore[assignment]
    return node


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_by_a_layer(tmp_path: Any, variant: str) -> None:
    config = configuration(tmp_path, **VARIANTS[variant])
    expected = sum(kept(Sizes.of(config, ROWS), recomputes=False, has_auxiliary_losses=False))
    assert bytes_kept(config.model, False, False) == pytest.approx(expected, abs=SCALARS)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("recomputes, has_auxiliary_losses", [(True, False), (False, True)])
def test_kept_with_recomputation_or_losses(tmp_path: Any, recomputes: bool, has_auxiliary_losses: bool) -> None:
    config = configuration(tmp_path)
    expected = sum(kept(Sizes.of(config, ROWS), recomputes, has_auxiliary_losses))
    assert bytes_kept(config.model, recomputes, has_auxiliary_losses) == pytest.approx(expected, abs=SCALARS)


def test_weight_gradients_are_as_the_parameters(tmp_path: Any) -> None:
    config = configuration(tmp_path, use_qk_norm=True)
    layer = Layer(config.model)
    expected = sum(p.numel() * (2 if is_matrix(name, p.ndim) else 4) for name, p in layer.named_parameters())
    assert weight_gradients(config) == expected


def test_sizes_are_those_of_the_code() -> None:
    """Which the planner does not import, since that imports PyTorch."""
    from p828.engine.deepspeed import reduce
    from p828.train.checkpointing import SPARE_BYTES

    assert backend.LOSS_CHUNK_TOKENS["cuda"] == LOSS_CHUNK_TOKENS
    assert backend.LOSS_COLUMNS["cuda"] == LOSS_COLUMNS
    assert reduce.SEGMENTS == SEGMENTS
    assert SPARE_BYTES == 2**30
