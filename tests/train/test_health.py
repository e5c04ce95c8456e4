"""A run that looks at its own records: what it says, when it says it, and what it does about it."""

import random
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from p828.cli.main import dispatch
from p828.health.finding import Finding
from p828.health.of_run import findings_of
from p828.health.rules import loss
from p828.health.window import Window
from p828.runs import records
from p828.train import health
from runs import write_text, write_toml

Sections = dict[str, Any]


def train(directory: Path, name: str, *flags: str, **sections: Sections) -> int:
    path = write_toml(
        directory,
        evaluation=sections.pop("evaluation", {"every": 0, "prompts": []}),
        train={"steps": 40, **sections.pop("train", {})},
        **sections,
    )
    return dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs"), *flags])


def recorded(run: Path) -> list[tuple[str, str]]:
    lines = (line for line in records.read(run / "metrics.jsonl") if line["kind"] == "finding")
    return [(line["rule"], line["severity"]) for line in lines]


def test_a_healthy_run_says_nothing_and_a_sick_one_says_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SHARE", 1e9)  # looks after every step
    assert train(tmp_path, "well") == 0
    assert recorded(tmp_path / "runs" / "well") == []
    assert "since step" not in capsys.readouterr().out

    assert train(tmp_path, "sick", "--optimizer.learning-rate", "1") == 0
    run = tmp_path / "runs" / "sick"
    found = recorded(run)
    assert found == [("learning_rate_high", "warning"), ("learning_rate_high", "critical")]
    out = capsys.readouterr().out
    assert out.count("critical: learning_rate_high since step") == 1
    assert "\n  cause  optimizer.learning_rate = 1 is too high for this model and batch\n" in out
    assert max(map(len, out.split("critical: ")[1].split("\nstep")[0].split("\n"))) <= 80
    assert "critical: learning_rate_high" in (run / "log.txt").read_text()

    assert train(tmp_path, "sick", "--optimizer.learning-rate", "1", train={"steps": 60}) == 0
    assert recorded(run) == found, "a run that is resumed has told it before"
    assert [finding.rule for finding in findings_of(run)] == ["learning_rate_high"]


def test_a_critical_finding_stops_a_run_that_is_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SHARE", 1e9)
    flags = ("--optimizer.learning-rate", "1", "--health.on-critical", "stop")
    assert train(tmp_path, "stopped", *flags) == 1
    error = capsys.readouterr().err
    assert "learning_rate_high at step" in error
    assert 'health.on_critical = "stop"' in error
    assert "the run stops here" in error
    assert "To do: a tenth of the rate" in error
    steps = [line["step"] for line in records.read(tmp_path / "runs" / "stopped" / "metrics.jsonl")]
    assert max(steps) < 40

    assert train(tmp_path, "stopped", *flags) == 1, "the same command again"
    assert 'health.on_critical = "continue" goes on in spite of it' in capsys.readouterr().err
    assert train(tmp_path, "stopped", *flags[:2]) == 0


def test_what_the_last_evaluation_shows_stops_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(window: Window) -> list[Finding]:
        texts = ("it was evaluated", "a cause", "a remedy", "a reference")
        return [Finding("evaluated", "critical", window.step, 1, *texts)] if window.evaluations else []

    monkeypatch.setattr("p828.health.examine.RULES", (rule,))
    assert train(tmp_path, "run", "--health.on-critical", "stop", train={"steps": 12}) == 1
    assert "evaluated at step 12" in capsys.readouterr().err


def test_a_run_goes_back_before_the_data_from_which_it_did_not_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long noise, twice, to which the loss stays far above that of text; afterwards it is as if there had been none."""
    monkeypatch.setattr(health, "SHARE", 1e9)
    text = write_text(tmp_path / "text", documents=150)
    for seed, name in ((3, "149.txt"), (4, "090.txt")):
        noise = random.Random(seed).choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=9000)
        (text / name).write_text("".join(noise))
    sections: dict[str, Sections] = {
        "data": {"shuffle_rows": 1, "block_documents": 1},
        "train": {"steps": 220, "seed": 6},
        "checkpoint": {"every": 25, "keep_last": 20},
    }
    assert train(tmp_path, "back", "--health.on-critical", "roll_back", **sections) == 0
    lines = list(records.read(tmp_path / "runs" / "back" / "metrics.jsonl"))
    events = [line for line in lines if line.get("event") == "rollback"]
    findings = [line for line in lines if line["kind"] == "finding" and line["rule"] == "spike_unrecovered"]
    assert len(events) == len(findings) == 2
    for event, finding in zip(events, findings, strict=True):
        assert "spike_unrecovered since step" in event["text"]
        assert event["step"] < finding["since"] <= event["step"] + 25
        assert any(f"{name}, document 0" in finding["evidence"] for name in ("149.txt", "090.txt")), (
            "the noise is named"
        )
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == list(range(1, 221))


def fail(*_: object) -> NoReturn:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    "place, part",
    [
        ("", "the rule "),
        ("p828.train.health.Window.add", "the watch over run health"),
        ("p828.train.health.readable", "the watch over run health"),
        ("p828.train.health.look", "the watch over run health"),
        ("p828.train.health.HealthWatch._is_odd", "the naming of odd data"),
    ],
)
def test_what_fails_is_told_once_and_ends_no_run(
    place: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"{part} failed, and is left out from here on: ZeroDivisionError: division by zero"
    if part == "the rule ":
        monkeypatch.setattr("p828.health.examine.RULES", (fail, loss.divergence))
        said = said.replace(part, "the rule test_health.fail")
    else:
        monkeypatch.setattr(place, fail)
    assert train(tmp_path, "run", train={"steps": 12}) == 0
    shown = capsys.readouterr().out
    assert "Traceback" not in shown
    events = records.read(tmp_path / "runs" / "run" / "metrics.jsonl")
    (event,) = (line for line in events if line.get("event") == "health_failed")
    assert event["text"] == said
    last, log = 'raise ZeroDivisionError("division by zero")', (tmp_path / "runs" / "run" / "log.txt").read_text()
    assert last in event["traceback"]
    assert last in log


def test_records_are_enough_afterwards(tmp_path: Path) -> None:
    """The run itself said nothing: its records come from an earlier version, and a checkpoint was cut short since."""
    assert train(tmp_path, "run", train={"steps": 30}) == 0
    run = tmp_path / "runs" / "run"
    assert findings_of(run) == []
    (weights,) = (run / "checkpoints" / "step_00000030").glob("model*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    (finding,) = findings_of(run)
    assert (finding.rule, finding.severity) == ("half_written_state", "critical")
    assert weights.name in finding.evidence
    shutil.rmtree(run / "checkpoints")
    assert findings_of(run) == []
