"""The loop's own decisions, on real runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from p828.cli.main import dispatch
from p828.config import load
from p828.data.loader import Batch
from p828.model.flops import training_flops
from p828.train import metrics
from p828.train.engine import PlainEngine
from runs import write_toml


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(here: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics.read(here / "runs" / "tiny" / "metrics.jsonl") if line["kind"] == kind]


def checkpoints(here: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (here / "runs" / "tiny" / "checkpoints").glob("step_*"))


def test_a_run_records_every_step_and_every_evaluation(here: Path) -> None:
    assert dispatch(["train", str(write_toml(here))]) == 0
    steps = lines(here, "step")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines(here, "eval")] == [5, 10, 12]
    assert [line["step"] for line in lines(here, "sample")] == [5, 10, 12]
    for line in steps:
        assert line["tokens"] == line["step"] * 2 * 2 * 32
        assert {"loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "seconds"} <= set(
            line
        )
        # two layers; 128 tokens choose two of four experts
        assert [sum(load) for load in line["load"]] == [256, 256]
        assert all(0 <= score <= 1 for score in line["balance"])
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_newest_and_the_best_checkpoints_are_kept(here: Path) -> None:
    # a learning rate that ruins the model after the first evaluation makes that one the best
    path = write_toml(
        here, train={"steps": 20}, evaluation={"every": 2}, checkpoint={"every": 4, "keep_last": 2},
        schedule={"kind": "constant", "warmup_steps": 20}, optimizer={"learning_rate": 3.0},
    )  # fmt: skip
    assert dispatch(["train", str(path)]) == 0
    losses = {line["step"]: line["loss"] for line in lines(here, "eval")}
    best = min(losses, key=losses.__getitem__)
    assert best < 12
    assert checkpoints(here) == sorted({best, 16, 20})


def test_patience_ends_the_run_early(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(
        here, train={"steps": 200}, evaluation={"every": 2, "patience": 2},
        schedule={"kind": "constant", "warmup_steps": 10}, optimizer={"learning_rate": 3.0},
    )  # fmt: skip
    assert dispatch(["train", str(path)]) == 0
    evaluations = lines(here, "eval")
    assert evaluations[-1]["step"] < 200
    assert [line["best"] for line in evaluations[-3:]] == [True, False, False]
    assert "stopped early" in capsys.readouterr().out
    assert evaluations[-1]["step"] in checkpoints(here)
    assert dispatch(["train", str(path)]) == 0, "a run that stopped early stays stopped"
    assert lines(here, "eval") == evaluations


def test_three_non_finite_steps_in_a_row_stop_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(here, optimizer={"learning_rate": 1e30}, schedule={"warmup_steps": 0}, evaluation={"every": 0})
    assert dispatch(["train", str(path)]) == 1
    said = capsys.readouterr()
    assert "3 steps in a row" in said.err
    assert len(said.err.strip().splitlines()) == 2
    events = [line for line in lines(here, "event") if line["event"] == "non_finite"]
    assert [event["step"] for event in events] == [line["step"] for line in lines(here, "step")][-3:]


def test_the_bigram_baseline_is_computed_when_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", str(write_toml(here, evaluation={"bigram_baseline": True}))]) == 0
    assert "bigram" in capsys.readouterr().out


@pytest.mark.parametrize("masks", [True, False])
def test_mfu_counts_the_attention_that_the_mask_leaves(
    here: Path, monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    """As a share of a peak that this machine has not: pairs of tokens counted in each micro-batch's own mask."""
    pairs, forward_backward = [], PlainEngine.forward_backward

    def counting(engine: PlainEngine, batch: Batch, num_targets: int) -> None:
        ids_BS = batch.document_ids_BS
        seen_BSS = (ids_BS[:, :, None] == ids_BS[:, None, :]) | torch.tensor(not masks)
        pairs.append(int(seen_BSS.tril().sum()))
        forward_backward(engine, batch, num_targets)

    monkeypatch.setattr(PlainEngine, "forward_backward", counting)
    monkeypatch.setattr("p828.train.trainer.peak_flops", lambda device: 1e9)
    path = write_toml(here, model={"mask_documents": masks}, train={"steps": 3})
    assert dispatch(["train", str(path)]) == 0
    model, steps = load(str(path)).model, lines(here, "step")
    assert len(pairs) == 2 * len(steps) == 6
    for number, line in enumerate(steps):
        flops = training_flops(model, 2 * 2 * 32, sum(pairs[2 * number : 2 * number + 2]))
        assert line["mfu"] == pytest.approx(flops / (line["seconds"] * 1e9))


@pytest.mark.parametrize("norm, said", [(True, 1), (False, 0)])
def test_a_router_that_the_loss_does_not_teach_is_said(here: Path, norm: bool, said: int) -> None:
    path = write_toml(here, model={"num_experts_per_tok": 1, "norm_topk_prob": norm}, train={"steps": 1})
    assert dispatch(["train", str(path)]) == 0
    events = [line["text"] for line in lines(here, "event") if line["event"] == "remark"]
    assert len(events) == said
    assert all("model.norm_topk_prob = false" in text for text in events)
