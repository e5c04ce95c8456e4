"""Which code computes what, for every device and dtype; and that nobody else decides it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import p828.model.backend
import p828.model.experts
from p828.model.backend import (
    allows_cuda_graph,
    attention_backend,
    computable,
    experts_backend,
    remarks,
    uses_triton,
)
from p828.model.experts import Experts, SharedExperts
from tiny import make_documents, tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "device, dtype, triton, experts, attention",
    [
        (CPU, F32, False, "loop", {"auto": "flash_cpu", "flash": "flash_cpu"}),
        (CPU, BF16, False, "loop", {"auto": "flash_cpu", "flash": "flash_cpu"}),
        (GPU, F32, False, "loop", {"auto": "reference"}),
        (GPU, BF16, True, "triton", {"auto": "flash_triton", "flash": "flash_triton"}),
    ],
)
def test_decisions(
    device: torch.device, dtype: torch.dtype, triton: bool, experts: str, attention: dict[str, str]
) -> None:
    assert uses_triton(device, dtype) == triton
    for hidden_act in ("swiglu", "swiglu_of_product"):
        assert experts_backend(hidden_act, device, dtype, drops=False) == experts
        assert experts_backend(hidden_act, device, dtype, drops=True) == ("grouped_mm" if triton else "loop")
    for wanted, expected in (attention | {"reference": "reference"}).items():
        model = tiny_config(attention_backend=wanted)
        assert attention_backend(model, device, dtype) == expected
        assert allows_cuda_graph(model, device, dtype) == (expected == "flash_triton")
        assert remarks(model, device, dtype) == []
    assert not allows_cuda_graph(tiny_config(dropout=0.1), device, dtype)


@pytest.mark.parametrize("device, dtype", [(CPU, F32), (CPU, BF16), (GPU, F32), (GPU, BF16)])
def test_an_activation_without_a_kernel_runs_on_plain_code(device: torch.device, dtype: torch.dtype) -> None:
    model = replace(tiny_config(), hidden_act=cast(Any, "relu2"))
    plain = "grouped_mm" if (device, dtype) == (GPU, BF16) else "loop"
    assert {experts_backend(model.hidden_act, device, dtype, drops) for drops in (False, True)} == {plain}
    assert not allows_cuda_graph(model, device, dtype)
    expected = ['model.hidden_act = "relu2": no GPU kernel computes it; the experts run on plain code']
    assert remarks(model, device, dtype) == (expected if plain == "grouped_mm" else [])


@pytest.mark.parametrize("module", [Experts, SharedExperts])
def test_experts_ask_by_their_activation(module: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of a GPU are asked for tensors of a CPU: `triton` would end in a kernel that is not there."""
    asked = []

    def on_a_gpu(hidden_act: str, device: torch.device, dtype: torch.dtype, drops: bool) -> str:
        asked.append(experts_backend(hidden_act, GPU, BF16, drops))
        return "loop" if asked[-1] == "grouped_mm" else asked[-1]

    monkeypatch.setattr(p828.model.experts, "experts_backend", on_a_gpu)
    experts = module(replace(tiny_config(), hidden_act=cast(Any, "relu2")))
    x_TH, experts_TK = torch.randn(5, 32), torch.arange(10).view(5, 2) % 8
    if isinstance(experts, Experts):
        experts(x_TH, torch.ones(5, 2), experts.permutation(x_TH, experts_TK, None))
    else:
        experts(x_TH)
    assert set(asked) == {"grouped_mm"}


@pytest.mark.parametrize(
    "changes, device, dtype, backend, expected",
    [
        ({}, GPU, BF16, "auto", BF16),
        ({"head_dim": 12}, GPU, BF16, "reference", F32),
        ({"head_dim": 12}, CPU, BF16, "auto", BF16),
        ({"attention_backend": "flash"}, GPU, F32, "reference", F32),
        ({"attention_backend": "flash"}, CPU, F32, "flash", F32),
    ],
)
def test_what_a_device_computes_a_model_with(
    changes: dict[str, Any], device: torch.device, dtype: torch.dtype, backend: str, expected: torch.dtype
) -> None:
    model, found = computable(tiny_config(**changes), device, dtype)
    assert (model.attention_backend, found) == (backend, expected)


def test_decisions_break_no_compiled_graph() -> None:
    """`fullgraph` raises where the compiler would have to go back to Python."""
    documents, positions = make_documents([[3, 5]])
    tokens = torch.randint(97, (1, 8))
    model = tiny_model(n_shared_experts=1, dropout=0.1)
    expected = model(tokens, positions, documents).hidden_BSH
    layer = model.layers[0]
    for module in (layer.input_layernorm, layer.mlp.gate, layer.mlp.shared_experts):
        module.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(tokens, positions, documents).hidden_BSH, expected)


def test_only_the_backend_asks_for_the_device() -> None:
    asking = re.compile(r"is_cuda|\.device\.type|device\.type ==|torch\.bfloat16")
    folder = Path(p828.model.backend.__file__).parent
    found = {file.name for file in folder.glob("*.py") if asking.search(file.read_text(encoding="utf-8"))}
    # A block of random numbers and a chunk of logits are looked up in the backend's tables.
    assert found <= {"backend.py", "random_normal.py", "loss.py"}
