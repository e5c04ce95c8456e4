import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.config import Config
from p828.data.batch import Batch
from p828.engine.interface import StepResult, StepStats
from p828.engine.plain import PlainEngine
from p828.errors import ConfigError
from p828.kernels.adamw import join_float32
from p828.model.loss import linear_cross_entropy
from p828.runs.tensors import Master, Saveable, tensors_of
from p828.system.device import pick_dtype
from runs import run_config

KINDS = pytest.mark.parametrize("dtype, moment_dtype", [("float32", "auto"), ("bfloat16", "bfloat16")])


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


def gradients_of(engine: PlainEngine) -> dict[str, torch.Tensor]:
    """The sums of the step so far, by parameter."""
    return {name: engine.gradients.sums[parameter] for name, parameter in engine.model.named_parameters()}


def test_bfloat16_on_a_gpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    gpu = torch.device("cuda")
    for capability, auto in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pick_dtype("auto", gpu) == auto
        assert pick_dtype("float32", gpu) == torch.float32
    assert pick_dtype("bfloat16", gpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r'train.dtype = "bfloat16": an older GPU .* "float32"'):
        pick_dtype("bfloat16", gpu)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    config = run_config(tmp_path, balance={"sequence_loss_weight": 0.01, "z_loss_weight": 0.001})
    batches = [batch_of(config, seed, rows) for seed, rows in ((0, 2), (1, 1), (2, 3))]
    accumulated, whole = PlainEngine(config), PlainEngine(config)
    for batch in batches:
        accumulated.forward_backward(batch, num_targets=6 * 32)
    whole.forward_backward(join(batches), num_targets=6 * 32)
    theirs = gradients_of(whole)
    for name, ours in gradients_of(accumulated).items():
        # float32 sums of 192 tokens in another order: some units of 2^-24, relative to the largest term
        torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
    first, second = accumulated.step(1e-3), whole.step(1e-3)
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert first.loads == second.loads
    assert sum(first.loads[0]) == 6 * 32 * config.model.num_experts_per_tok


@pytest.mark.parametrize("is_measured", [False, True])
def test_a_steps_numbers_are_on_their_way_before_its_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_measured: bool
) -> None:
    """What is told of the update comes after it."""
    config = run_config(tmp_path)
    engine, order = PlainEngine(config), list[str]()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(StepStats, "of", noted("numbers", StepStats.of))
    monkeypatch.setattr(engine.optimizer, "update", noted("update", engine.optimizer.update))
    engine.forward_backward(batch_of(config, 0, 2), 64)
    found = engine.step(1e-3, is_measured)
    assert order == (["update", "numbers"] if is_measured else ["numbers", "update"])
    assert ("update_ratios" in found.further) == is_measured


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


def train(engine: PlainEngine, seeds: range) -> list[StepResult]:
    results = []
    for seed in seeds:
        engine.forward_backward(batch_of(engine.config, seed, 2), 64)
        results.append(engine.step(1e-2))
    return results


def all_tensors(engine: PlainEngine) -> dict[str, torch.Tensor]:
    return {key: value for part in saved_tensors(engine).values() for key, value in part.items()}


def saved_tensors(engine: PlainEngine) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint of it holds."""
    return {
        part: {key: join_float32(*v) if isinstance(v, Master) else values(v).clone() for key, v in tensors.items()}
        for part, tensors in engine.state_dict().items()
    }


def values(value: Saveable) -> torch.Tensor:
    (tensor,) = tensors_of(value)
    return tensor


def assert_equal_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_loss_by_autograd(tmp_path: Path, tied: bool) -> None:
    """Embedding and head, which the engine keeps from autograd, among them; tied, both uses in one sum."""
    balance = {"sequence_loss_weight": 0.01, "z_loss_weight": 0.001}
    config = run_config(tmp_path, model={"tie_word_embeddings": tied}, balance=balance)
    engine, batch = PlainEngine(config), batch_of(config, 0, 2)
    batch.targets_BS[:, 4:9] = -100
    engine.forward_backward(batch, 54)
    model = PlainEngine(config).model
    model.zero_grad()
    valid = batch.targets_BS >= 0
    output = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, valid_BS=valid)
    loss = linear_cross_entropy(output.hidden_BSH.flatten(0, 1), model.head_weight, batch.targets_BS.flatten())
    (loss + 0.01 * output.router.balance_loss_L.sum() + 0.001 * output.router.z_loss_L.sum()).div(54).backward()
    gradients = gradients_of(engine)
    assert ("lm_head.weight" in gradients) != tied
    for name, parameter in model.named_parameters():
        # The same layers; embedding and head differ in the order of sums, passed back through two layers.
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_gradients_are_near_those_in_float32(tmp_path: Path, tied: bool) -> None:
    model = {"tie_word_embeddings": tied, "num_experts_per_tok": 4, "n_routed_experts": 4}  # no choice to tip over
    configs = [run_config(tmp_path, model=model, train={"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    engines = [PlainEngine(config) for config in configs]
    for engine in engines:
        for seed in range(2):
            engine.forward_backward(batch_of(engine.config, seed, 2), 128)
    expected, actual = (gradients_of(engine) for engine in engines)
    for name, gradient in expected.items():
        # Some ten roundings to bfloat16 of 2^-9 on the way; the router's gradient is a small difference of large terms.
        assert (actual[name] - gradient).norm() < 0.06 * gradient.norm() + 1e-6, name


@KINDS
def test_gradients_are_clipped_to_the_global_norm(tmp_path: Path, dtype: str, moment_dtype: str) -> None:
    optimizer = {"max_grad_norm": 1e-3, "moment_dtype": moment_dtype}
    engine = PlainEngine(run_config(tmp_path, optimizer=optimizer, train={"dtype": dtype}))
    engine.forward_backward(batch_of(engine.config, 0, 2), 64)
    unclipped = torch.cat([gradient.flatten() for gradient in gradients_of(engine).values()]).norm().item()
    assert unclipped > 0.1
    assert engine.step(1e-3).grad_norm == pytest.approx(unclipped, rel=1e-5)
    # After one step the first moment is 1 − beta1 of the clipped gradient.
    found = engine.optimizer.state_dict()
    moments = [value.flatten().float() for name, value in found.items() if "exp_avg/" in name]
    assert torch.cat(moments).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


@KINDS
def test_a_non_finite_step_changes_nothing(tmp_path: Path, dtype: str, moment_dtype: str) -> None:
    config = run_config(tmp_path, optimizer={"moment_dtype": moment_dtype}, train={"dtype": dtype})
    engine = PlainEngine(config)
    assert train(engine, range(1))[0].applied
    before, row = all_tensors(engine), engine.model.head_weight[5].detach().clone()
    with torch.no_grad():
        engine.model.head_weight[5] = math.inf
    (result,) = train(engine, range(1, 2))
    assert not result.applied
    assert not math.isfinite(result.loss)
    with torch.no_grad():
        engine.model.head_weight[5] = row
    assert_equal_tensors(all_tensors(engine), before)
    assert train(engine, range(2, 3))[0].applied


@KINDS
def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path: Path, dtype: str, moment_dtype: str) -> None:
    config = run_config(
        tmp_path, model={"dropout": 0.1}, optimizer={"moment_dtype": moment_dtype}, train={"dtype": dtype}
    )
    engine = PlainEngine(config)
    train(engine, range(3))
    saved = saved_tensors(engine)
    assert all(value.dtype == torch.float32 for value in saved["model"].values())
    expected = train(engine, range(3, 6))
    loaded = PlainEngine(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7)))
    loaded.load_state_dict(saved)
    assert train(loaded, range(3, 6)) == expected
    assert_equal_tensors(all_tensors(loaded), all_tensors(engine))


@KINDS
def test_it_learns(tmp_path: Path, dtype: str, moment_dtype: str) -> None:
    """The same batch again and again: its loss falls by half, whatever the weights and moments are kept in."""
    engine = PlainEngine(run_config(tmp_path, optimizer={"moment_dtype": moment_dtype}, train={"dtype": dtype}))
    batch, losses = batch_of(engine.config, 0, 2), []
    for _ in range(25):
        engine.forward_backward(batch, 64)
        losses.append(engine.step(1e-2).loss)
    assert losses[-1] < 0.5 * losses[0]


def test_router_norms_and_bias_stay_float32_in_bfloat16_runs(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"dtype": "bfloat16"}, balance={"update_rate": 1e-4})
    engine = PlainEngine(config)
    train(engine, range(3))
    for layer in engine.model.layers:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.dtype == layer.mlp.gate.weight.dtype == layer.input_layernorm.weight.dtype == torch.float32
        assert bias.abs().max() <= 3 * 2e-4
    assert engine.model.head_weight.dtype == layer.mlp.experts.down_proj.dtype == torch.bfloat16
