"""Whole steps on a GPU: they learn, repeat and resume bit for bit, and keep the host waiting once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p828.data.loader import Batch
from p828.train.engine import PlainEngine, StepResult
from runs import run_config


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_engine(
    tmp_path: Path, device: str = "cuda", tied: bool = False, compile_: str = "off", **optimizer: str
) -> PlainEngine:
    sizes = {"tie_word_embeddings": tied, "hidden_size": 64, "head_dim": 16}
    train = {"device": device, "dtype": "bfloat16", "compile": compile_}
    return PlainEngine(run_config(tmp_path, model=sizes, train=train, optimizer=optimizer))


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
        results.append(engine.step(1e-2))
    return results


def saved(engine: PlainEngine) -> dict[str, dict[str, Tensor]]:
    return {
        part: {key: value.cpu().clone() for key, value in tensors.items()} for part, tensors in engine.tensors().items()
    }


def assert_equal_engines(first: PlainEngine, second: PlainEngine) -> None:
    ours, theirs = saved(first), saved(second)
    for part, tensors in ours.items():
        for name, value in tensors.items():
            assert torch.equal(value, theirs[part][name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_steps_repeat_and_resume_bit_for_bit(cuda: torch.device, tmp_path: Path, tied: bool) -> None:
    first, second = make_engine(tmp_path, tied=tied), make_engine(tmp_path, tied=tied)
    assert first.tensors()["optimizer"]["exp_avg/model.embed_tokens.weight"].dtype == torch.bfloat16
    assert train(first, range(3)) == train(second, range(3))
    third = make_engine(tmp_path, tied=tied)
    third.load_tensors(saved(first))
    expected = train(first, range(3, 6))
    assert train(second, range(3, 6)) == expected
    assert train(third, range(3, 6)) == expected
    assert_equal_engines(first, second)
    assert_equal_engines(first, third)


def test_recorded_micro_batches_compute_what_unrecorded_ones_do(cuda: torch.device, tmp_path: Path) -> None:
    recording, plain = make_engine(tmp_path, compile_="on"), make_engine(tmp_path, compile_="on")
    plain.stop_recording()
    assert train(recording, range(4)) == train(plain, range(4))
    # A shape in between, of which nothing is recorded, and weights that come from elsewhere.
    for engine in (recording, plain):
        engine.forward_backward(batch_of(0, rows=3), 192)
        engine.step(1e-2)
    assert_equal_engines(recording, plain)
    recording.load_tensors(saved(make_engine(tmp_path)))
    plain.load_tensors(saved(make_engine(tmp_path)))
    assert train(recording, range(4, 6)) == train(plain, range(4, 6))
    assert_equal_engines(recording, plain)


@pytest.mark.parametrize("moment_dtype", ["auto", "float32"])
def test_it_learns(cuda: torch.device, tmp_path: Path, moment_dtype: str) -> None:
    engine = make_engine(tmp_path, moment_dtype=moment_dtype)
    losses = [train(engine, range(1))[0].loss for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_goes_on_on_the_cpu(cuda: torch.device, tmp_path: Path) -> None:
    engine, on_cpu = make_engine(tmp_path), make_engine(tmp_path, device="cpu")
    train(engine, range(3))
    on_cpu.load_tensors(saved(engine))
    masters = engine.optimizer.masters()
    assert all(torch.equal(value, masters[name]) for name, value in on_cpu.optimizer.masters().items())
    assert torch.equal(on_cpu.model.head_weight, engine.model.head_weight.cpu())
    # The same step in bfloat16 on two devices: losses differ by the layers' rounding.
    assert train(on_cpu, range(3, 4))[0].loss == pytest.approx(train(engine, range(3, 4))[0].loss, rel=2e-2)


def test_the_update_does_not_wait_for_the_device(cuda: torch.device, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    train(engine, range(1))  # compiles the kernels
    engine.forward_backward(batch_of(0), 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = engine.optimizer.gradient_norm()
        engine.optimizer.update(1e-3, norm, torch.isfinite(norm))
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
