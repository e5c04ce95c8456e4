"""Each probe finds the fault that it is for, and nothing in a model without one."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from p828.config import Config
from p828.data.batch import Batch, Sample
from p828.data.loader import make_batch
from p828.distributed.group import ProcessGroup
from p828.engine.plain import PlainEngine
from p828.inference import evaluate
from p828.model import transformer
from p828.model.attention import AttentionMask
from p828.model.router import Router, Routing
from p828.model.transformer import Layer, Transformer
from p828.runs import records
from p828.runs.records import Recorder
from p828.train.log.console import Console
from p828.train.log.log import Log
from p828.train.log.usage import Usage
from p828.train.probes import Probes
from runs import run_config

ROUNDING = 1e-5  # nats: a few roundings of float32 in a log-probability of a small model
LENGTH = 48


def rows_of(seed: int, count: int = 3, divided: bool = True) -> list[Sample]:
    """Random tokens, in two or three documents a row, or in one."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((count, LENGTH + 1), np.int32)
    if divided:
        for row in range(count):
            ids[row, 11 + 3 * row :] += 1
            ids[row, 30 + row :] += row % 2
    return [Sample(draw.integers(300, size=LENGTH + 1), row) for row in ids]


class Trial:
    """A small engine, rows to train on and others to validate on, and the probes of a run."""

    def __init__(self, tmp_path: Path, is_divided: bool = True, **sections: dict[str, Any]) -> None:
        sections["train"] = {"gradient_checkpointing": True, **sections.get("train", {})}
        self.config: Config = run_config(tmp_path, data={"sequence_length": LENGTH}, **sections)
        self.engine, self.is_divided = PlainEngine(self.config), is_divided
        self.batches = [self.batch(seed) for seed in (1, 2)]
        self.path, config = tmp_path / "run", self.config
        self.recorder, console = Recorder(self.path), Console(self.path, 12, 0, is_quiet=True)
        log = Log(self.recorder, console, Usage(), config.model, config.data, config.train, self.engine.device)
        self.probes = Probes(config, [self.batch(0)], self.engine, log, ProcessGroup())

    def batch(self, seed: int) -> Batch:
        return make_batch(rows_of(seed, divided=self.is_divided), self.config.model.mask_documents)

    def numbers(self) -> dict[str, Any]:
        """Those of the first step, made as the trainer has them made."""
        targets = sum(batch.num_targets for batch in self.batches)
        self.probes.before_step(self.batches, targets)
        for batch in self.batches:
            self.engine.forward_backward(batch, targets)
        self.probes.note(self.batches)
        self.probes.after_step(1, self.engine.step(1e-3))
        self.recorder.close()
        (line,) = records.read(self.path / "metrics.jsonl")
        assert (line.pop("kind"), line.pop("step")) == ("probe", 1)
        return line


BALANCE = {"sequence_loss_weight": 0.01, "z_loss_weight": 0.001}


@pytest.mark.parametrize("is_divided", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_model_has_nothing_to_find(tmp_path: Path, dtype: str, is_divided: bool) -> None:
    numbers = Trial(tmp_path, is_divided, balance=BALANCE, train={"dtype": dtype}).numbers()
    assert numbers.pop("aux_gradient") > 1e-4
    # In bfloat16 a product of other rows may round differently once, by 2^-8 of a logit below 1.
    most = ROUNDING if dtype == "float32" else 2.0**-7
    assert set(numbers) == {
        "future_leak", "document_leak", "row_leak", "evaluation_difference", "loss_difference", "position_error",
        "batch_leak", "reroute", "validation_overlap",
    }  # fmt: skip
    assert all(0 <= number <= most for number in numbers.values()), numbers
    assert numbers["evaluation_difference"] == numbers["position_error"] == numbers["reroute"] == 0


def test_probes_of_what_is_off_are_left_out(tmp_path: Path) -> None:
    trial = Trial(tmp_path, model={"mask_documents": False, "dropout": 0.1}, train={"gradient_checkpointing": False})
    numbers = trial.numbers()
    assert not {"document_leak", "aux_gradient", "reroute", "loss_difference"} & set(numbers)
    assert numbers["evaluation_difference"] == 0, "an evaluation drops nothing"


def test_probes_change_nothing(tmp_path: Path) -> None:
    """Weights and random states after a step with dropout, recomputation and auxiliary losses, with probes and without.

    A probe's backward pass draws from the random states that dropout draws from.
    """
    results = []
    for name, is_probed in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        trial = Trial(tmp_path / name, model={"dropout": 0.3}, balance=BALANCE)
        if not is_probed:
            trial.probes.run = lambda *arguments: None  # type: ignore[method-assign]
            trial.probes.before_step = lambda *arguments: None  # type: ignore[method-assign]
        for _ in range(2):
            for batch in trial.batches:
                trial.engine.forward_backward(batch, 100)
            trial.probes.after_step(1, trial.engine.step(1e-2))
        results.append((*trial.engine.model.state_dict().values(), torch.get_rng_state()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def whole_mask(model: Transformer, tokens_BS: torch.Tensor, ids_BS: torch.Tensor, dtype: torch.dtype) -> AttentionMask:
    return AttentionMask("reference", torch.ones(*tokens_BS.shape, tokens_BS.shape[1], dtype=torch.bool).tril())


def mask_without_order(
    model: Transformer, tokens_BS: torch.Tensor, ids_BS: torch.Tensor, dtype: torch.dtype
) -> AttentionMask:
    return AttentionMask("reference", ids_BS[:, :, None] == ids_BS[:, None, :])


def test_documents_that_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "_attention_mask", whole_mask)
    for is_divided in (True, False):  # rows without a border are given one
        numbers = Trial(tmp_path / str(is_divided), is_divided).numbers()
        assert numbers["document_leak"] > 100 * ROUNDING
        assert numbers["future_leak"] <= ROUNDING


@pytest.fixture(autouse=True)
def _directories(tmp_path: Path) -> None:
    for name in ("True", "False"):
        (tmp_path / name).mkdir()


def test_tokens_that_see_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "_attention_mask", mask_without_order)
    numbers = Trial(tmp_path).numbers()
    assert numbers["future_leak"] > 100 * ROUNDING
    assert numbers["document_leak"] <= ROUNDING


def test_rows_that_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Transformer.embed

    def with_the_row_above(model: Transformer, tokens_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        embedded_BSH = embed(model, tokens_BS, dtype)
        above_BSH = embedded_BSH.roll(1, 0).clone()
        above_BSH[0] = 0
        return embedded_BSH + 0.1 * above_BSH

    monkeypatch.setattr(Transformer, "embed", with_the_row_above)
    assert Trial(tmp_path).numbers()["row_leak"] > 100 * ROUNDING


def test_positions_that_depend_on_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Transformer.forward

    def across_rows(model: Transformer, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, *rest: Any, **named: Any):  # type: ignore[no-untyped-def]
        rows, length = tokens_BS.shape
        return forward(model, tokens_BS, torch.arange(rows * length).view(length, rows).T, *rest, **named)

    monkeypatch.setattr(Transformer, "forward", across_rows)
    numbers = Trial(tmp_path, model={"initializer_range": 0.2}).numbers()
    assert numbers["batch_leak"] > 100 * ROUNDING
    assert numbers["row_leak"] <= ROUNDING, "no row sees how many rows there are by itself"


@pytest.mark.parametrize("masks", [True, False])
def test_positions_that_run_on_over_the_rows(tmp_path: Path, masks: bool) -> None:
    trial = Trial(tmp_path, model={"mask_documents": masks})
    places = torch.arange(3 * LENGTH).view(3, LENGTH)
    trial.batches = [dataclasses.replace(batch, positions_BS=places) for batch in trial.batches]
    # The last row's last document begins at 17 or 32, the row's positions at 2 * LENGTH.
    assert trial.numbers()["position_error"] == 2 * LENGTH + (17 if masks else 0)


def test_dropout_in_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def as_in_training(model: Transformer) -> Iterator[None]:
        with torch.inference_mode():
            yield

    monkeypatch.setattr(evaluate, "evaluation_mode", as_in_training)
    assert Trial(tmp_path, model={"dropout": 0.1}).numbers()["evaluation_difference"] > 1e-6


@pytest.mark.parametrize("name", ["z_loss", "sequence_balance_loss"])
def test_an_auxiliary_loss_without_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_gradient: Callable[..., torch.Tensor] = getattr(transformer, name)

    def detached(routing: Routing, *arguments: Any) -> torch.Tensor:
        free = [routing.scores_TE.detach(), routing.logits_TE.detach()]
        return with_gradient(routing._replace(scores_TE=free[0], logits_TE=free[1]), *arguments)

    balance = {"z_loss_weight": 0.01} if name == "z_loss" else {"sequence_loss_weight": 0.01}
    healthy = Trial(tmp_path / "True", balance=balance).probes
    with healthy.engine.model_for_evaluation() as model:
        assert (healthy._gradients(model, healthy.validation[0])["aux_gradient"] or 0) > 1e-5
    monkeypatch.setattr(transformer, name, detached)
    broken = Trial(tmp_path / "False", balance=balance).probes
    with broken.engine.model_for_evaluation() as model:
        assert broken._gradients(model, broken.validation[0])["aux_gradient"] == 0


def test_a_loss_that_is_a_sum_of_the_micro_batches_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = PlainEngine.forward_backward
    monkeypatch.setattr(
        PlainEngine, "forward_backward", lambda engine, batch, targets: add(engine, batch, batch.num_targets)
    )
    assert Trial(tmp_path).numbers()["loss_difference"] == pytest.approx(math.log(300), rel=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_recomputation_that_routes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """A layer that is recomputed as a whole, with a router whose logits are not the same twice."""
    layer, route, calls = Layer.forward, Router.forward, iter(range(10**6))

    def recomputed(self: Layer, *arguments: Any) -> Any:
        self.gradient_checkpointing = False
        return checkpoint(layer, self, *arguments, use_reentrant=False) if torch.is_grad_enabled() else layer(
            self, *arguments
        )  # fmt: skip

    def noisy(self: Router, x_TH: torch.Tensor) -> Routing:
        generator = torch.Generator().manual_seed(next(calls))
        return route(self, x_TH + noise * torch.randn(x_TH.shape, generator=generator))

    monkeypatch.setattr(Layer, "forward", recomputed)
    monkeypatch.setattr(Router, "forward", noisy)
    found = Trial(tmp_path).numbers()["reroute"]
    assert found > 0 if noise else found == 0


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_validation_rows_that_are_trained_on(tmp_path: Path, rows: int) -> None:
    """They come in other rows, a third of a row later than they were."""
    trial = Trial(tmp_path)
    tokens = np.concatenate([row.tokens for row in rows_of(0)[:rows]] or [np.zeros(0, int)])
    stream = np.concatenate([np.arange(LENGTH // 3), tokens, np.arange(LENGTH)])
    given = [stream[start : start + LENGTH + 1] for start in range(0, len(stream) - LENGTH, LENGTH)]
    trial.batches.append(make_batch([Sample(one, np.zeros(LENGTH + 1, np.int32)) for one in given], True))
    assert trial.numbers()["validation_overlap"] == rows / 3


def test_later_probes_take_a_thousandth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p828.train.probes.FIRST", 2)
    trial = Trial(tmp_path)
    for step in (1, 2, 3):
        trial.probes.run(step)
    trial.probes._next = 0.0  # the time has come
    trial.probes.run(4)
    assert [line["step"] for line in records.read(trial.path / "metrics.jsonl")] == [1, 2, 4]
