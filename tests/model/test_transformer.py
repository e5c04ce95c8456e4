"""The whole decoder: recomputation, statistics, dtypes, and what a token may depend on."""

import pytest
import torch
from torch import Tensor

from oracles import BFLOAT16, FLOAT32, assert_near
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer, document_bounds
from tiny import tiny_model

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 0, 1]])


def loss_and_gradients(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Every output's gradient at once: the loss, and both router losses."""
    torch.manual_seed(5)
    model.zero_grad()
    output = model(tokens, POSITIONS, DOCUMENTS)
    loss = linear_cross_entropy(output.hidden_BSH.flatten(0, 1), model.head_weight, tokens.roll(-1, 1).flatten())
    loss = loss + 0.1 * output.router.balance_loss_L.sum() + 0.01 * output.router.z_loss_L.sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), output.router.loads_LE, *(g.clone() for g in gradients if g is not None)]


@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_compiled_layers_have_the_gradients_of_plain_ones(backend: str) -> None:
    """Some versions of PyTorch lose the gradients of a compiled function, without an error."""
    model = tiny_model(attention_backend=backend, use_qk_norm=True, n_shared_experts=1)
    tokens = torch.randint(97, (2, 8))
    plain = loss_and_gradients(model, tokens)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    for actual, expected in zip(loss_and_gradients(model, tokens), plain, strict=True):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_gradient_checkpointing_changes_no_bit(dropout: float, backend: str) -> None:
    model = tiny_model(dropout=dropout, attention_backend=backend).train()
    tokens = torch.randint(97, (2, 8))
    plain = loss_and_gradients(model, tokens)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer.mlp.experts.register_forward_hook(count)
        layer.mlp.gate.register_forward_hook(count)
    recomputed = loss_and_gradients(model, tokens)
    assert calls == 2 * (2 + 1)  # experts run twice a layer, the router once
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_backends_agree() -> None:
    tokens = torch.randint(97, (2, 8))
    reference, flash = (loss_and_gradients(tiny_model(attention_backend=b), tokens) for b in ("reference", "flash"))
    for a, b in zip(reference, flash, strict=True):
        assert_near(a, b, 2e-5)  # rounding of two float32 layers, forward and back


def test_loads_leave_padding_out() -> None:
    model = tiny_model()
    tokens = torch.randint(97, (2, 8))
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts_TK))
    loads_LE = model(tokens, POSITIONS, DOCUMENTS).router.loads_LE
    real_T = (DOCUMENTS >= 0).flatten()
    for loads_E, experts_TK in zip(loads_LE, chosen, strict=True):
        assert loads_E.tolist() == [int((experts_TK[real_T] == e).sum()) for e in range(8)]
    assert loads_LE.sum(1).tolist() == [14 * 3] * 2
    assert model(tokens).router.loads_LE.sum(1).tolist() == [16 * 3] * 2


def test_router_losses_are_those_of_each_layer() -> None:
    model = tiny_model()
    routings = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, routing: routings.append(routing))
    statistics = model(torch.randint(97, (2, 8))).router
    expected = torch.stack([routing.logits_TE.exp().sum(-1).log().square().sum() for routing in routings])
    torch.testing.assert_close(statistics.z_loss_L, expected)
    assert statistics.balance_loss_L.shape == (2,)
    # Per token at least 1 when chosen and scored alike, above when uneven; this model's routing is uneven.
    assert (statistics.balance_loss_L > 16).all()
    for layer in model.layers:
        layer.auxiliary_losses = False
    statistics = model(torch.randint(97, (2, 8))).router
    assert not statistics.balance_loss_L.any()
    assert not statistics.z_loss_L.any()


def test_no_token_sees_the_future() -> None:
    model = tiny_model()
    tokens = torch.randint(97, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens).hidden_BSH, model(changed).hidden_BSH
    # Before the change nothing moves but by the order of sums in the experts' products of other sizes.
    assert_near(before[:, :7], after[:, :7], 1e-5)
    assert (before[:, 7:] - after[:, 7:]).norm(dim=-1).min() > 1e-3


def test_rows_do_not_depend_on_each_other() -> None:
    model = tiny_model()
    tokens = torch.randint(97, (3, 8))
    with torch.no_grad():
        together = model(tokens).hidden_BSH
        alone = torch.cat([model(row[None]).hidden_BSH for row in tokens])
    assert_near(together, alone, 1e-5)


def test_shared_experts_add_to_the_routed() -> None:
    mlp = tiny_model().model.layers[0].mlp
    x = torch.randn(6, 32)
    routing = mlp.gate(x)
    inputs = x, routing.weights_TK, mlp.experts.permutation(x, routing.experts_TK, None)
    assert torch.equal(mlp(*inputs), mlp.experts(*inputs) + mlp.shared_experts(x))
    lone = tiny_model(n_shared_experts=0).model.layers[0].mlp
    assert torch.equal(lone(*inputs), lone.experts(*inputs))


def test_bfloat16_keeps_float32_weights_router_and_gradients() -> None:
    # All experts chosen: a choice that tips over under bfloat16's rounding is no error, but would look like one.
    model = tiny_model(num_hidden_layers=1, num_experts_per_tok=8)
    tokens = torch.randint(97, (2, 8))
    full, half = model(tokens), model(tokens, dtype=torch.bfloat16)
    assert half.hidden_BSH.dtype == torch.bfloat16
    assert half.router.z_loss_L.dtype == torch.float32
    assert model.logits(half.hidden_BSH).dtype == torch.float32
    # Embedding, norm, attention, experts and final norm round one after the other: a few times one part's error.
    assert_near(half.hidden_BSH, full.hidden_BSH, 3 * BFLOAT16)
    half.hidden_BSH.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_frequencies_are_no_part_of_the_saved_state() -> None:
    names = set(tiny_model().state_dict())
    assert not any("frequencies" in name for name in names)
    assert "model.layers.0.mlp.gate.e_score_correction_bias" in names


def test_document_bounds() -> None:
    """Documents end where the id changes and with their row, whatever the next row's id is; padding is one too."""
    start, end = document_bounds(torch.tensor([[0, 0, 1, 1, 2], [2, 2, 2, -1, -1]]))
    assert (start.dtype, end.dtype) == (torch.int32, torch.int32)
    assert start.tolist() == [0, 0, 2, 2, 4, 5, 5, 5, 8, 8]
    assert end.tolist() == [2, 2, 4, 4, 5, 8, 8, 8, 10, 10]
    assert [bound.tolist() for bound in document_bounds(torch.zeros(1, 1, dtype=torch.int64))] == [[0], [1]]
