import math
from pathlib import Path

import pytest
import torch

from p828.config import Config
from p828.data.loader import Batch
from p828.train.engine import PlainEngine
from runs import run_config


def batch_of(config: Config, seed: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, (rows, config.data.sequence_length + 1), generator=generator)
    positions = torch.arange(config.data.sequence_length).expand(rows, -1).contiguous()
    return Batch(
        tokens[:, :-1].clone(),
        tokens[:, 1:].clone(),
        positions,
        torch.zeros_like(positions, dtype=torch.int32),
        32 * rows,
    )


def join(batches: list[Batch]) -> Batch:
    parts = ("tokens_BS", "targets_BS", "positions_BS", "document_ids_BS")
    joined = [torch.cat([getattr(batch, part) for batch in batches]) for part in parts]
    return Batch(*joined, num_targets=sum(batch.num_targets for batch in batches))


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    config = run_config(tmp_path, balance={"sequence_loss_weight": 0.01, "z_loss_weight": 0.001})
    batches = [batch_of(config, seed, rows) for seed, rows in ((0, 2), (1, 1), (2, 3))]
    accumulated, whole = PlainEngine(config), PlainEngine(config)
    for batch in batches:
        accumulated.forward_backward(batch, num_targets=6 * 32)
    whole.forward_backward(join(batches), num_targets=6 * 32)
    for (name, ours), theirs in zip(accumulated.model.named_parameters(), whole.model.parameters(), strict=True):
        assert ours.grad is not None
        # float32 sums of 192 tokens in another order: some units of 2^-24, relative to the largest term
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)
    first, second = accumulated.step(1e-3), whole.step(1e-3)
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert first.loads == second.loads
    assert sum(first.loads[0]) == 6 * 32 * config.model.num_experts_per_tok


def test_loss_and_gradient_do_not_depend_on_how_targets_are_spread(tmp_path: Path) -> None:
    """A micro-batch with few targets weighs as much as it has targets, not as much as any other."""
    config = run_config(tmp_path)
    full, sparse = batch_of(config, 0, 2), batch_of(config, 1, 2)
    sparse.targets_BS[:, 4:] = -100
    engine = PlainEngine(config)
    engine.forward_backward(full, 64 + 8)
    engine.forward_backward(sparse, 64 + 8)
    model = PlainEngine(config).model
    losses = [
        torch.nn.functional.cross_entropy(
            model.logits(model(batch.tokens_BS).hidden_BSH).flatten(0, 1), batch.targets_BS.flatten(), reduction="sum"
        )
        for batch in (full, sparse)
    ]
    assert engine.step(0.0).loss == pytest.approx(sum(losses).item() / 72, rel=1e-6)


def test_gradients_are_clipped_to_the_global_norm(tmp_path: Path) -> None:
    config = run_config(tmp_path, optimizer={"max_grad_norm": 1e-3, "learning_rate": 1.0})
    engine = PlainEngine(config)
    engine.forward_backward(batch_of(config, 0, 2), 64)
    unclipped = torch.stack([p.grad.norm() for p in engine.model.parameters() if p.grad is not None]).norm().item()
    zero_grad, engine.optimizer.zero_grad = engine.optimizer.zero_grad, lambda **_: None
    assert engine.step(1.0).grad_norm == pytest.approx(unclipped, rel=1e-5)
    clipped = torch.stack([p.grad.norm() for p in engine.model.parameters() if p.grad is not None]).norm().item()
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    engine.optimizer.zero_grad = zero_grad


def test_a_non_finite_step_changes_nothing(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    engine = PlainEngine(config)
    engine.forward_backward(batch_of(config, 0, 2), 64)
    assert engine.step(1e-2).applied
    before = {key: value.clone() for part in engine.tensors().values() for key, value in part.items()}
    with torch.no_grad():
        engine.model.head_weight[5] = math.inf
    engine.forward_backward(batch_of(config, 1, 2), 64)
    result = engine.step(1e-2)
    assert not result.applied
    assert not math.isfinite(result.loss)
    with torch.no_grad():
        engine.model.head_weight[5] = before["lm_head.weight"][5]
    after = {key: value for part in engine.tensors().values() for key, value in part.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    engine.forward_backward(batch_of(config, 2, 2), 64)
    assert engine.step(1e-2).applied


def test_the_bias_stays_float32_in_bfloat16_runs(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"dtype": "bfloat16"}, balance={"update_rate": 1e-4})
    engine = PlainEngine(config)
    for seed in range(3):
        engine.forward_backward(batch_of(config, seed, 2), 64)
        engine.step(1e-3)
    for layer in engine.model.model.layers:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert bias.abs().max() <= 3 * 2e-4
    assert all(parameter.dtype == torch.float32 for parameter in engine.model.parameters())
