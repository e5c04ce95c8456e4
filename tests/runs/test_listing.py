"""The list of runs: its numbers are those of all records, and nothing that lies in the directory ends it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from p828.cli.main import dispatch
from p828.cli.runs import as_lines
from p828.errors import ConfigError
from p828.runs.listing import Listing, list_runs
from p828.runs.summary import READ_BYTES, RunSummary, summary
from runs import start, wait_for_step, write_toml

OLD = Path(__file__).parents[1] / "data_of_old_versions" / "runs"
FINDING = {"kind": "finding", "step": 9, "since": 7, "rule": "load_imbalance", "severity": "warning"}


def train(directory: Path, name: str, *flags: str, **sections: dict[str, Any]) -> int:
    path = write_toml(directory, **sections)
    return dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs"), *flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("listing")
    assert train(directory, "whole") == 0
    return directory / "runs" / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(whole, tmp_path / "runs" / "copy")
    return tmp_path / "runs" / "copy"


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def append(run: Path, *found: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in found)


def without_end(run: Path) -> None:
    kept = [line for line in lines_of(run) if line.get("event") != "ended"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_its_numbers_are_those_of_the_records(whole: Path) -> None:
    steps = [line for line in lines_of(whole) if line["kind"] == "step"]
    evaluations = [line for line in lines_of(whole) if line["kind"] == "eval"]
    best = min(evaluations, key=lambda line: line["loss"])
    found = summary(whole)
    assert (found.name, found.state, found.step, found.steps) == ("whole", "complete", 12, 12)
    assert found.loss == steps[-1]["loss"]
    assert found.validation_loss == evaluations[-1]["loss"]
    assert (found.best_loss, found.best_step) == (best["loss"], best["step"])
    assert found.tokens_per_second == median(line["tokens_per_second"] for line in steps)
    assert found.unread_bytes == 0
    assert found.why == "", "the state says it"


def test_only_the_end_of_long_records_is_read(copy: Path) -> None:
    """The best loss is then the newest checkpoint's, which knows the whole run."""
    before = summary(copy)
    end = (copy / "metrics.jsonl").read_bytes()
    padding = json.dumps({"kind": "sample", "step": 1, "samples": ["x" * 1000]}).encode() + b"\n"
    (copy / "metrics.jsonl").write_bytes(padding * (READ_BYTES[0] // len(padding) + 5) + end)
    found = summary(copy)
    assert (
        found.unread_bytes == 5 * len(padding) + len(end) + READ_BYTES[0] // len(padding) * len(padding) - READ_BYTES[0]
    )
    assert (found.loss, found.best_loss, found.best_step) == (before.loss, before.best_loss, before.best_step)
    lines = as_lines(Listing([found], []), "runs")
    assert "Of 1 run only the end of the records was read: earlier findings are not counted." in lines


def test_a_run_that_is_trained_killed_and_paused(tmp_path: Path) -> None:
    path, run = write_toml(tmp_path, train={"steps": 400}, evaluation={"every": 0}), tmp_path / "runs" / "long"
    arguments = ["train", str(path), "--name", "long", "--runs_dir", str(tmp_path / "runs")]
    process = start(*arguments, cwd=tmp_path)
    wait_for_step(process, 1)
    assert (summary(run).state, summary(run).steps) == ("training", 400)
    process.kill()
    process.communicate()
    found = summary(run)
    assert found.state == "interrupted"
    assert found.why.startswith("no end is recorded, as of a process that was killed; ")
    process = start(*arguments, cwd=tmp_path)
    wait_for_step(process, (found.step or 0) + 1)
    assert summary(run).state == "training"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    found = summary(run)
    assert (process.returncode, found.state) == (0, "paused")
    assert found.why.startswith("stopped by SIGTERM after step")


def test_a_run_that_fails_and_one_that_stops_early(tmp_path: Path) -> None:
    texts = [json.dumps({"text": f"some words of text {number}"}) for number in range(400)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*texts, "{no JSON", ""]))
    held = {"kind": "files", "files": [str(tmp_path / "good.jsonl")]}
    (tmp_path / "good.jsonl").write_text(texts[0] + "\n")
    data = {"source": "files", "files": [str(tmp_path / "bad.jsonl")], "block_documents": 1, "validation": held}
    tokenizer = {"name": "train", "vocab_size": 300}
    assert train(tmp_path, "stops", evaluation={"every": 1, "patience": 1}, optimizer={"learning_rate": 3.0}) == 0
    found = summary(tmp_path / "runs" / "stops")
    assert (found.state, found.why) == ("stopped", "stopped early, out of patience,")
    data = {**data, "sequence_length": 32, "shuffle_rows": 1}
    shutil.copy(tmp_path / "runs" / "stops" / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer["name"] = str(tmp_path / "tokenizer.json")
    assert train(tmp_path, "fails", data=data, tokenizer=tokenizer, train={"steps": 500}) == 1
    found = summary(tmp_path / "runs" / "fails")
    assert found.state == "failed"
    assert "bad.jsonl:401: not a line of JSON" in found.why


def test_a_resumed_run_no_longer_has_its_end(copy: Path) -> None:
    append(copy, {"kind": "data", "step": 12, "sources": []})
    assert summary(copy).state == "complete", "by its steps"
    append(copy, {"kind": "event", "step": 12, "event": "ended", "state": "failed", "why": "no room"})
    assert (summary(copy).state, summary(copy).why) == ("failed", "no room")


def test_health_is_the_worst_finding(copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("\n[health]", "\n[not_health]"))
    assert summary(copy).health is None, "nobody has watched it"
    config.write_text(config.read_text() + '\n[health]\non_critical = "continue"\n')
    assert summary(copy).health == "ok"
    append(copy, {"kind": "event", "step": 9, "event": "health_failed", "text": "the rules failed"})
    assert summary(copy).health == "failed"
    append(copy, {"kind": "data", "step": 9, "sources": []})
    assert summary(copy).health == "ok", "its next start has rules again"
    append(copy, FINDING)
    assert (summary(copy).health, summary(copy).finding) == ("warning", "load_imbalance")
    append(copy, {**FINDING, "severity": "critical", "rule": "divergence"}, {**FINDING, "severity": "note"})
    assert (summary(copy).health, summary(copy).finding) == ("critical", "divergence")
    assert "critical: divergence" in as_lines(list_runs(copy.parent), "runs")[1]


@pytest.mark.parametrize("name, state, step", [("two-ranks", "interrupted", 7), ("whole-tensors", "interrupted", 7)])
def test_a_run_of_an_old_version(name: str, state: str, step: int) -> None:
    found = summary(OLD / name)
    assert (found.state, found.step, found.steps, found.best_step, found.health) == (state, step, 12, 5, None)


def test_an_old_run_that_recorded_no_end(copy: Path) -> None:
    without_end(copy)
    assert summary(copy).state == "complete"
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("\nsteps = 12\n", "\nsteps = 20\n"))
    assert (summary(copy).state, summary(copy).steps) == ("paused", 20)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def all_checkpoints_cut(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/model.safetensors"):
        cut(path)


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Any, str]] = {
    "no line is a record": (lambda run: (run / "metrics.jsonl").write_bytes(b"\0" * 5000 + b"\n" * 3), "is a record"),
    "records are a FIFO": (lambda run: a_fifo(run / "metrics.jsonl"), "not a regular file"),
    "records are a directory": (lambda run: a_directory(run / "metrics.jsonl"), "directory"),
    "config is no TOML": (lambda run: (run / "config.toml").write_text("steps = = 3"), "cannot be read as TOML"),
    "config is no text": (lambda run: (run / "config.toml").write_bytes(b"\xff\xfe\0"), "decode"),
    "every checkpoint is cut": (all_checkpoints_cut, "no checkpoint is complete"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_a_line_of_the_list(case: str, copy: Path, whole: Path) -> None:
    break_it, reason = DAMAGE[case]
    shutil.copytree(whole, copy.with_name("whole"))
    break_it(copy)
    found = {run.name: run for run in list_runs(copy.parent).runs}
    assert found["copy"].state == "damaged"
    assert reason in found["copy"].why
    assert found["whole"].state == "complete"


def test_a_cut_checkpoint_beside_others_and_a_partial_line_are_no_damage(copy: Path) -> None:
    cut(copy / "checkpoints" / "step_00000012" / "optimizer.safetensors")
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"step","st')
    assert (summary(copy).state, summary(copy).step) == ("complete", 12)


def test_what_is_no_run_is_named(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mixed"
    shutil.copytree(whole, directory / "a")
    (directory / "notes").mkdir()
    (directory / "exported").mkdir()
    for name in ("config.json", "config.toml"):
        (directory / "exported" / name).write_text("")
    (directory / "text.txt").write_text("")
    (directory / "circle").symlink_to(directory / "circle")
    (directory / ".hidden").mkdir()
    (directory / "new").mkdir()
    (directory / "new" / "config.toml").write_text("[train]\nsteps = 5\n")
    found = list_runs(directory)
    assert {run.name: run.state for run in found.runs} == {"a": "complete", "new": "empty"}
    assert found.others == ["circle", "exported", "notes", "text.txt"]
    assert "No runs: circle, exported, notes, text.txt" in as_lines(found, "mixed")


def test_a_run_without_finite_losses(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(copy, {"kind": "step", "step": 13, "loss": "NaN"}, {"kind": "eval", "step": 13, "loss": "Infinity"})
    assert dispatch(["runs", str(copy.parent), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["loss"], found["validation_loss"], found["best_step"]) == ("NaN", "Infinity", summary(copy).best_step)
    assert dispatch(["runs", str(copy.parent)]) == 0
    assert " nan " in capsys.readouterr().out


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, None])
def test_the_table_fits(width: int | None) -> None:
    long = RunSummary(
        "a-run-with-a-long-name-of-its-settings", "interrupted", "", 350_000, 500_000, 2.345, 2.4, 2.39, 1, 1_234_567.0,
        "critical", "router_collapse", 3600.0,
    )  # fmt: skip
    lines = as_lines(Listing([long, RunSummary("b", "training")], []), "runs", width)
    shown = [line for line in lines if not line.startswith("left out")]
    assert all("350,000/500,000" in line for line in shown[1:2])
    if width is None:
        assert long.name in shown[1]
    elif width >= 60:
        assert max(map(len, lines)) <= width


def test_wrong_input(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["runs", str(whole.parent) + "x"]) == 2
    assert f"no such directory; did you mean {whole.parent}?" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert dispatch(["runs", str(tmp_path / "file")]) == 2
    assert "is a file; a directory of runs is accepted" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert dispatch(["runs", str(tmp_path / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        list_runs(tmp_path / "missing")
    assert [run.name for run in list_runs(whole).runs] == ["whole"], "a run's own directory"


def test_neither_command_needs_torch() -> None:
    code = "import sys, p828.cli.runs, p828.cli.compare; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
