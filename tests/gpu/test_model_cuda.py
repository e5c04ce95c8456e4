"""The whole model on a GPU: against the CPU, compiled against eager, and repeated bit for bit.

All experts are chosen (K = E) where numbers of different rounding are compared: a choice that tips over changes the
result by far more than rounding does, and is no error.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from oracles import BFLOAT16, FLOAT32, assert_near
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer
from tiny import make_documents, tiny_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "initializer_range": 0.01,
}
ROWS = [[20, 1, 11], [32]]
# About ten roundings to bfloat16 lie on the way through two layers, as many on the way back; errors add as their root.
DEEP = 3 * BFLOAT16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Transformer, rows: list[list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    device = model.frequencies.device
    documents, positions = make_documents(rows)
    tokens = torch.randint(97, documents.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    output = model(tokens.to(device), positions.to(device), documents.to(device), dtype=dtype)
    targets = tokens.roll(-1, 1).flatten().to(device)
    loss = linear_cross_entropy(output.hidden_BSH.flatten(0, 1), model.head_weight, targets) / targets.numel()
    loss.backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(results) == sum(1 for _ in model.parameters())
    return {"loss": loss.detach(), "loads": output.router.loads_LE, **results}


def assert_same_training(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The loss and all gradients as one vector within the tolerance; each gradient within twice that.

    A single gradient may be the small difference of large terms (the router's, the sinks'), so its own error is
    larger; one of wrong sign, or missing, would be off by one or more.
    """
    assert_near(actual["loss"], expected["loss"], tolerance)
    assert torch.equal(actual["loads"].cpu(), expected["loads"].cpu())
    names = [name for name in expected if name not in ("loss", "loads")]
    vectors = [torch.cat([d[name].double().cpu().flatten() for name in names]) for d in (actual, expected)]
    assert (vectors[0] - vectors[1]).norm() <= tolerance * vectors[1].norm()
    for name in names:
        ours, theirs = actual[name].double().cpu(), expected[name].double().cpu()
        assert (ours - theirs).norm() <= 2 * tolerance * theirs.norm() + 1e-6, name


@pytest.mark.parametrize(
    "changes", [{}, {"use_qk_norm": True, "hidden_act": "swiglu_of_product"}], ids=["plain", "other"]
)
def test_bfloat16_on_the_gpu_against_float32_on_the_cpu(cuda: torch.device, changes: dict[str, Any]) -> None:
    expected = loss_and_gradients(tiny_model(**SMALL, **changes), ROWS, torch.float32)
    model = tiny_model(**SMALL, **changes).to(cuda)
    actual = loss_and_gradients(model, ROWS, torch.bfloat16)
    assert_same_training(actual, expected, DEEP)


def test_float32_on_the_gpu_with_the_reference_backend(cuda: torch.device) -> None:
    expected = loss_and_gradients(tiny_model(**SMALL), ROWS, torch.float32)
    actual = loss_and_gradients(tiny_model(**SMALL, attention_backend="reference").to(cuda), ROWS, torch.float32)
    assert_same_training(actual, expected, 10 * FLOAT32)


def test_compiled_layers_train_as_eager_ones(cuda: torch.device) -> None:
    eager = loss_and_gradients(tiny_model(**SMALL).to(cuda), ROWS, torch.bfloat16)
    model = tiny_model(**SMALL).to(cuda)
    for layer in model.model.layers:
        layer.compile()
    # Compiled code rounds fewer intermediate values, so the two differ by what either differs from the truth.
    assert_same_training(loss_and_gradients(model, ROWS, torch.bfloat16), eager, DEEP)
    assert counters["stats"]["unique_graphs"] > 0


def test_another_number_of_documents_compiles_nothing_new(cuda: torch.device) -> None:
    model = tiny_model(**SMALL).to(cuda)
    for layer in model.model.layers:
        layer.compile()
    # The first count is compiled as it is, the second makes the size a variable.
    for lengths in ([32], [16, 16]):
        loss_and_gradients(model, [lengths, [32]], torch.bfloat16)
    compiled = counters["stats"]["unique_graphs"]
    for lengths in ([10, 10, 12], [1] * 32, [31, 1], [5, 5, 5, 17]):
        loss_and_gradients(model, [lengths, [32]], torch.bfloat16)
    assert compiled > 0
    assert counters["stats"]["unique_graphs"] == compiled


def test_compiled_layers_under_checkpointing(cuda: torch.device) -> None:
    plain, recomputing = (tiny_model(**SMALL).to(cuda) for _ in range(2))
    for layer in recomputing.model.layers:
        layer.gradient_checkpointing = True
        layer.compile()
    expected = loss_and_gradients(plain, ROWS, torch.bfloat16)
    assert_same_training(loss_and_gradients(recomputing, ROWS, torch.bfloat16), expected, DEEP)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_deterministic_repeats_bit_for_bit(cuda: torch.device, compiled: bool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model = tiny_model(**{**SMALL, "num_experts_per_tok": 2}, dropout=0.1).to(cuda).train()
        if compiled:
            for layer in model.model.layers:
                layer.compile()

        def once() -> dict[str, Tensor]:
            torch.manual_seed(4)
            return loss_and_gradients(model, [[200, 1, 55], [256]], torch.bfloat16)

        once()  # compiles
        first, second = once(), once()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
