"""Whole steps on a GPU: they learn, repeat and resume bit for bit, and the host waits for their numbers alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p828.data.batch import Batch
from p828.engine.interface import StepResult
from p828.engine.plain import PlainEngine
from p828.inference.evaluate import evaluate
from p828.kernels.adamw import join_float32
from p828.model import backend
from p828.optim.clipping import global_norm, gradient_norms
from p828.runs.tensors import Master
from runs import run_config
from tiny import joined


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_engine(
    tmp_path: Path, device: str = "cuda", tied: bool = False, compile_: str = "off", **sections: dict[str, object]
) -> PlainEngine:
    sizes = {"tie_word_embeddings": tied, "hidden_size": 64, "head_dim": 16} | sections.pop("model", {})
    train = {"device": device, "dtype": "bfloat16", "compile": compile_} | sections.pop("train", {})
    return PlainEngine(run_config(tmp_path, model=sizes, train=train, **sections))


def batch_of(seed: int, rows: int = 2) -> Batch:
    tokens = torch.randint(300, (rows, 33), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(32).expand(rows, -1).contiguous()
    documents = torch.zeros_like(positions, dtype=torch.int32)
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), positions, documents, 32 * rows)


def train(engine: PlainEngine, seeds: range) -> list[StepResult]:
    results = []
    for seed in seeds:
        for part in range(2):
            engine.forward_backward(batch_of(10 * seed + part), 128)
        results.append(engine.step(1e-2, is_measured=True))
    return results


def saved(engine: PlainEngine) -> dict[str, dict[str, Tensor]]:
    return {
        part: {
            key: join_float32(*value).cpu() if isinstance(value, Master) else value.cpu().clone()
            for key, value in tensors.items()
        }
        for part, tensors in engine.state_dict().items()
    }


def assert_equal_engines(first: PlainEngine, second: PlainEngine) -> None:
    ours, theirs = saved(first), saved(second)
    for part, tensors in ours.items():
        for name, value in tensors.items():
            assert torch.equal(value, theirs[part][name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_steps_repeat_and_resume_bit_for_bit(cuda: torch.device, tmp_path: Path, tied: bool) -> None:
    first, second = make_engine(tmp_path, tied=tied), make_engine(tmp_path, tied=tied)
    assert first.optimizer.state_dict()["exp_avg/model.embed_tokens.weight"].dtype == torch.bfloat16
    assert train(first, range(3)) == train(second, range(3))
    third = make_engine(tmp_path, tied=tied)
    third.load_state_dict(saved(first))
    expected = train(first, range(3, 6))
    assert train(second, range(3, 6)) == expected
    assert train(third, range(3, 6)) == expected
    assert_equal_engines(first, second)
    assert_equal_engines(first, third)


def test_captured_micro_batches_compute_what_others_do(cuda: torch.device, tmp_path: Path) -> None:
    capturing, plain = make_engine(tmp_path, compile_="on"), make_engine(tmp_path, compile_="on")
    plain.gradients.stop_capturing()
    assert train(capturing, range(4)) == train(plain, range(4))
    # Other numbers of targets need no other graph.
    captured = len(capturing.gradients._graphs._captured)
    for num_targets in (127, 126, 127, 125):
        for engine in (capturing, plain):
            engine.forward_backward(batch_of(num_targets), num_targets)
        assert capturing.step(1e-2) == plain.step(1e-2)
    assert len(capturing.gradients._graphs._captured) == captured
    # A shape in between, of which there is no graph, and weights that come from elsewhere.
    for engine in (capturing, plain):
        engine.forward_backward(batch_of(0, rows=3), 192)
        engine.step(1e-2)
    assert_equal_engines(capturing, plain)
    capturing.load_state_dict(saved(make_engine(tmp_path)))
    plain.load_state_dict(saved(make_engine(tmp_path)))
    assert train(capturing, range(4, 6)) == train(plain, range(4, 6))
    assert_equal_engines(capturing, plain)


def test_what_else_runs_between_captured_micro_batches(cuda: torch.device, tmp_path: Path) -> None:
    """Evaluation and saving use the device's memory, and must leave the graphs' as it is."""
    capturing, plain = (
        make_engine(tmp_path, compile_="on", balance={"sequence_loss_weight": 0.01, "z_loss_weight": 0.001})
        for _ in range(2)
    )
    plain.gradients.stop_capturing()
    for engine in (capturing, plain):
        train(engine, range(3))
    evaluate(capturing.model, [batch_of(7, rows=4)], torch.bfloat16)
    saved(capturing)
    assert train(capturing, range(3, 6)) == train(plain, range(3, 6))
    assert_equal_engines(capturing, plain)


@pytest.mark.parametrize(
    "changes, is_captured",
    [
        ({}, True),
        ({"model": {"dropout": 0.1}}, False),
        ({"model": {"attention_backend": "reference"}}, False),
        ({"train": {"gradient_checkpointing": True}}, False),
        ({"train": {"dtype": "float32"}}, False),
        ({"train": {"compile": "off"}}, False),
    ],
    ids=str,
)
def test_what_is_captured(
    cuda: torch.device, tmp_path: Path, changes: dict[str, dict[str, object]], is_captured: bool
) -> None:
    """What draws random numbers or asks the device for one is not; it trains all the same."""
    engine = make_engine(tmp_path, compile_="on", **changes)
    assert all(result.applied for result in train(engine, range(3)))
    assert (engine.gradients._graphs is not None) == is_captured


def test_an_activation_without_a_kernel(cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains without CUDA graphs; plain code gives what the kernels give of an activation that has one."""
    with_kernels = make_engine(tmp_path, compile_="on")
    expected = train(with_kernels, range(3))
    monkeypatch.setattr(backend, "TRITON_ACTIVATIONS", ())
    engine = make_engine(tmp_path, compile_="on")
    assert engine.gradients._graphs is None
    # Losses in bfloat16 differ by the layers' rounding.
    for ours, theirs in zip(train(engine, range(3)), expected, strict=True):
        assert ours.applied
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-2)


@pytest.mark.parametrize("moment_dtype", ["auto", "float32"])
def test_it_learns(cuda: torch.device, tmp_path: Path, moment_dtype: str) -> None:
    engine = make_engine(tmp_path, optimizer={"moment_dtype": moment_dtype})
    losses = [train(engine, range(1))[0].loss for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_goes_on_on_the_cpu(cuda: torch.device, tmp_path: Path) -> None:
    engine, on_cpu = make_engine(tmp_path), make_engine(tmp_path, device="cpu")
    train(engine, range(3))
    on_cpu.load_state_dict(saved(engine))
    masters = joined(engine.masters)
    assert all(torch.equal(value, masters[name]) for name, value in joined(on_cpu.masters).items())
    assert torch.equal(on_cpu.model.head_weight, engine.model.head_weight.cpu())
    # The same step in bfloat16 on two devices: losses differ by the layers' rounding.
    assert train(on_cpu, range(3, 4))[0].loss == pytest.approx(train(engine, range(3, 4))[0].loss, rel=2e-2)


def test_the_update_does_not_wait_for_the_device(cuda: torch.device, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    train(engine, range(1))  # compiles the kernels
    engine.forward_backward(batch_of(0), 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = global_norm(gradient_norms(engine.gradients.sums.values()))
        engine.optimizer.update(1e-3, norm, torch.isfinite(norm))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_measured", [False, True])
def test_a_step_waits_for_its_numbers_alone(cuda: torch.device, tmp_path: Path, is_measured: bool) -> None:
    """For the event of their copy, which is no synchronizing operation. Weights are still updated when they are there,
    unless something of the update is measured."""
    engine = make_engine(tmp_path)
    train(engine, range(1))  # compiles the kernels
    update = engine.optimizer.update

    def slow_update(*arguments: Any) -> None:
        update(*arguments)
        torch.cuda._sleep(10**9)  # half a second of the device

    engine.optimizer.update = slow_update
    engine.forward_backward(batch_of(0), 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = engine.step(1e-3, is_measured)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_measured or not torch.cuda.current_stream().query()
    assert result.applied


def test_a_non_finite_step_changes_nothing(cuda: torch.device, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    train(engine, range(2))
    before, row = saved(engine), engine.model.head_weight[5].detach().clone()
    with torch.no_grad():
        engine.model.head_weight[5] = float("inf")
    assert not train(engine, range(2, 3))[0].applied
    with torch.no_grad():
        engine.model.head_weight[5] = row
    after = saved(engine)
    assert all(
        torch.equal(value, after[part][name]) for part, values in before.items() for name, value in values.items()
    )
    assert train(engine, range(3, 4))[0].applied
