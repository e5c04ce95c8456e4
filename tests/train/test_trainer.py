"""The loop's own decisions, on real runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.cli.main import dispatch
from p828.config import Config, from_dict, load
from p828.data.batch import Batch
from p828.engine.plain import PlainEngine
from p828.model.costs import training_flops
from p828.runs import checkpoint, records
from p828.train.resume import changed_rate
from runs import write_text, write_toml


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(here: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in records.read(here / "runs" / "tiny" / "metrics.jsonl") if line["kind"] == kind]


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


def test_a_complete_run_whose_text_cannot_be_read_for_the_bigram_baseline_stays_complete(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"abc def {number}" * 20}) + "\n" for number in range(2000)]
    text = here / "text.jsonl"
    text.write_text("".join([*lines, "no JSON\n"]))
    data = {"files": [str(text)], "block_documents": 8, "validation": {"kind": "files", "files": [str(here / "v.txt")]}}
    (here / "v.txt").write_text("abc def " * 200)
    path = str(write_toml(here, data=data, train={"steps": 2}, evaluation={"bigram_baseline": True, "every": 0}))
    assert dispatch(["train", path, "--name", "other", "--data.files", str(here / "v.txt")]) == 0
    tokenizer = str(here / "runs" / "other" / "tokenizer.json")
    capsys.readouterr()
    assert dispatch(["train", path, "--tokenizer.name", tokenizer]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "there is no bigram baseline: " in said
    assert "text.jsonl:2001: not a line of JSON" in said
    assert "is complete at step 2" in said


DIVERGING = {"optimizer": {"learning_rate": 1e30}, "schedule": {"warmup_steps": 0}}


def test_a_diverged_run_is_ended_by_its_guard_and_not_by_its_prompts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["train", str(write_toml(here, evaluation={"every": 1}, **DIVERGING))]) == 1
    said = capsys.readouterr()
    assert "3 steps in a row" in said.err
    assert "(best)" not in said.out
    assert [line["best"] for line in lines(here, "eval")] == [False] * len(lines(here, "eval"))
    assert {"diverged", "no_samples"} <= {line["event"] for line in lines(here, "event")}


def test_patience_does_not_end_a_run_among_steps_that_are_not_finite(here: Path) -> None:
    path = write_toml(here, evaluation={"every": 1, "patience": 2, "prompts": []}, **DIVERGING)
    assert dispatch(["train", str(path)]) == 1


def test_a_diverged_run_with_prompts_is_rolled_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(
        here, evaluation={"every": 1}, rollback={"after_steps": 2, "limit": 1}, checkpoint={"every": 1}, **DIVERGING
    )
    assert dispatch(["train", str(path)]) == 1
    assert "rolled back 1 times before" in capsys.readouterr().err
    assert [line["event"] for line in lines(here, "event")].count("rollback") == 1


def test_a_malformed_line_ends_the_run_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file that is read as far as the line only after some steps."""
    assert dispatch(["train", str(write_toml(here)), "--name", "first"]) == 0
    texts = [path.read_text()[:100] for path in sorted(write_text(here / "more", documents=300, seed=1).iterdir())]
    lines_of_text = [json.dumps({"text": text}) + "\n" for text in texts]
    lines_of_text[279] = '{"no": "text"}\n'
    (here / "more.jsonl").write_text("".join(lines_of_text))
    validation = {"kind": "files", "files": [str(here / "text" / "*.txt")]}
    data = {"files": [str(here / "more.jsonl")], "validation": validation, "block_documents": 4}
    path = write_toml(
        here, data={**data, "sequence_length": 128},
        tokenizer={"name": str(here / "runs" / "first" / "tokenizer.json")}, model={"max_position_embeddings": 128},
        train={"steps": 10_000, "micro_batch_size": 4}, evaluation={"every": 0}, checkpoint={"every": 10_000},
    )  # fmt: skip
    capsys.readouterr()
    assert dispatch(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert "more.jsonl:280: no field 'text'" in said
    found = re.search(r"^The run stops after step (\d+), which is saved", said, re.MULTILINE)
    assert found
    assert checkpoints(here) == [int(found[1])]
    assert int(found[1]) > 1


def test_tokens_decide_the_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_toml(here, evaluation={"every": 0}))
    assert dispatch(["train", path, "--train.tokens", "1e3"]) == 0
    assert len(lines(here, "step")) == 8  # of 128 tokens
    written = load(str(here / "runs" / "tiny" / "config.toml")).train
    assert (written.steps, written.tokens) == (8, 0)
    assert dispatch(["train", path, "--train.tokens", "1000", "--train.steps", "5"]) == 2
    assert "one of them decides" in capsys.readouterr().err
    in_file = str(write_toml(here, train={"tokens": 1000}))
    assert dispatch(["train", in_file, "--train.steps", "10"]) == 0
    assert len(lines(here, "step")) == 10, "a flag decides over the file"


def test_hours_end_a_run_complete_and_count_over_its_starts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_toml(here))
    assert dispatch(["train", path, "--train.steps", "2"]) == 0
    trained = checkpoint.load(checkpoint.resolve(here / "runs" / "tiny"), names=()).state["seconds"]
    assert trained > 0
    capsys.readouterr()
    # the first start took some of it: with what a step takes besides, one more is made
    assert dispatch(["train", path, "--train.hours", str((trained + 1e-6) / 3600)]) == 0
    assert "is complete after train.hours = " in capsys.readouterr().out
    assert [line["step"] for line in lines(here, "step")] == [1, 2, 3]
    assert [line["step"] for line in lines(here, "eval")] == [2, 3]
    assert checkpoints(here) == [2, 3]
    assert dispatch(["train", path, "--train.hours", str(trained / 3600)]) == 0
    assert len(lines(here, "step")) == 3


def test_a_longer_cosine_is_told_to_raise_the_rate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_toml(here, evaluation={"every": 0}))
    assert dispatch(["train", path]) == 0
    lowest = lines(here, "step")[-1]["lr"]
    capsys.readouterr()
    assert dispatch(["train", path, "--train.steps", "30"]) == 0
    said = capsys.readouterr().out
    (found,) = re.findall(
        r"the learning rate jumps: (\S+) at step 13, where the checkpoint's settings give (\S+),", said
    )
    assert float(found[0]) == pytest.approx(lines(here, "step")[12]["lr"], rel=1e-2)
    assert float(found[1]) == pytest.approx(lowest, rel=1e-2)
    # the way that it names does not jump
    (flags,) = re.findall(r"Without a jump: (--schedule.kind constant --optimizer.learning-rate \S+)\. ", said)
    last = lines(here, "step")[-1]["lr"]
    assert dispatch(["train", path, "--train.steps", "33", *flags.split()]) == 0
    assert "jumps" not in capsys.readouterr().out
    assert lines(here, "step")[-1]["lr"] == pytest.approx(last, rel=1e-2)


@pytest.mark.parametrize(
    "after, jumps",
    [
        ((12, "constant", 1e-3), False),
        ((13, "constant", 1e-3), False),  # the learning rate is another on purpose, and only that
        ((13, "constant", 1e-2), False),
        ((13, "cosine", 1e-3), True),
    ],
)
def test_another_learning_rate_is_no_jump_of_the_schedule(after: tuple[int, str, float], jumps: bool) -> None:
    def config(steps: int, kind: str, rate: float) -> Config:
        schedule = {"kind": kind, "warmup_steps": 2}
        return from_dict({"train": {"steps": steps}, "schedule": schedule, "optimizer": {"learning_rate": rate}}, "")

    assert bool(changed_rate(config(*after), 6, config(12, "constant", 1e-2))) == jumps


def test_data_and_epochs_are_reported_and_recorded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write_text(here / "few", documents=15) / "*.txt")]
    validation = {"kind": "files", "files": [str(here / "text" / "*.txt")]}
    data = {"files": files, "validation": validation}
    path = str(write_toml(here, data=data, evaluation={"every": 0}, train={"steps": 150}))
    assert dispatch(["train", path]) == 0
    said = capsys.readouterr().out
    (line,) = lines(here, "data")
    (source,) = line["sources"]
    assert source["epochs"] == pytest.approx(150 * 128 / source["tokens"])
    assert re.search(r"files: the run goes [45]\.\d times through its \d\.\d+ k tokens\. Above 4 epochs", said)
    epochs = [line["epoch"] for line in lines(here, "step")]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    assert epochs[-1] == int(source["epochs"])
    for shown in (
        "tiny\n",
        "  directory  runs/tiny\n",
        "  schedule ",
        "  steps      150 of 128 tokens",
        "at this rate",
    ):
        assert shown in said


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
    monkeypatch.setattr("p828.train.log.log.peak_flops", lambda device: 1e9)
    path = write_toml(here, model={"mask_documents": masks}, train={"steps": 3})
    assert dispatch(["train", str(path)]) == 0
    model, steps = load(str(path)).model, lines(here, "step")
    assert len(pairs) == 2 * len(steps) == 6
    for number, line in enumerate(steps):
        flops = training_flops(model, 2 * 2 * 32, sum(pairs[2 * number : 2 * number + 2]))
        assert line["mfu"] == pytest.approx(flops / (line["seconds"] * 1e9))


@pytest.mark.parametrize("norm, said", [(True, 1), (False, 0)])
def test_a_router_that_the_loss_does_not_teach_is_said(here: Path, norm: bool, said: int) -> None:
    path = write_toml(here, model={"num_experts_per_tok": 1, "norm_topk_prob": norm}, train={"steps": 2})
    assert dispatch(["train", str(path)]) == 0
    events = [line["text"] for line in lines(here, "event") if line["event"] == "remark"]
    assert len(events) == said
    assert all("model.norm_topk_prob = false" in text for text in events)


def test_a_warm_up_longer_than_the_run_is_said_once_the_run_begins(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in front of what a run is refused for."""
    path = write_toml(here, schedule={"warmup_steps": 5})
    said = "the run ends at step 2, within the 5 steps of its warm-up"
    assert dispatch(["train", str(path), "--train.steps", "2", "--data.files", "none"]) == 2
    assert said not in capsys.readouterr().out
    assert dispatch(["train", str(path), "--train.steps", "2"]) == 0
    assert said in capsys.readouterr().out
    assert said in [line["text"] for line in lines(here, "event") if line["event"] == "remark"]
