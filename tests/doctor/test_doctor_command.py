"""`p828 doctor` as it is called: lines and JSON, exit codes, and what is a configuration and what a run."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
from huggingface_hub import constants

from p828.cli.main import dispatch
from p828.cli.run_name import run_of
from p828.cli.status_lines import status_lines
from p828.doctor import room, run_directory, versions
from p828.files import locked
from p828.health.rules import state
from p828.health.window import Window
from runs import run_config, write_toml

OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_BASE_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}


def test_a_sound_configuration_passes_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_toml(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WANDB_BASE_URL", OFFLINE["WANDB_BASE_URL"])
    before = sorted(tmp_path.rglob("*"))
    assert dispatch(["doctor", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["status"] == "warning"
    assert {name for name, check in checks.items() if check["status"] != "ok"} <= {"weights & biases", "run directory"}
    assert {"python", "pytorch", "packages", "memory", "disk", "lock", "writing", "cpu matmul", "cpu memory",
            "kernel attention", "kernel routed experts", "hugging face hub", "model", "tokenizer", "data files",
            "epochs", "validation"} <= set(checks)  # fmt: skip
    assert all(set(check) == {"name", "status", "text", "remedy"} for check in found["checks"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_is_told_in_a_narrow_terminal_with_exit_code_1(tmp_path: Path) -> None:
    config = write_toml(tmp_path, tokenizer={"name": str(tmp_path / "none.json"), "vocab_size": 300})
    ours, theirs = pty.openpty()
    environment = {**os.environ, **OFFLINE, "COLUMNS": "40", "TERM": "xterm"}
    command = [sys.executable, "-m", "p828", "doctor", str(config)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        out = b""
        try:
            while data := os.read(ours, 65536):
                out += data
        except OSError:  # EIO: the terminal's other side is closed
            pass
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith("p828: 1 of ")
    assert last.endswith("checks failed: tokenizer")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.decode())
    assert max(map(len, plain.splitlines())) <= 40
    assert "failure  tokenizer: " in plain


def test_a_missing_package_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "p828", "doctor", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["pytorch"]["status"] == found["all else"]["status"] == "failure"
    assert "no torch here" in found["pytorch"]["text"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["quickstrat"], "did you mean quickstart?"),
        (["none.toml"], "no file none.toml"),
        (["empty"], "holds no config.toml"),
        (["/dev/null"], "/dev/null"),
        (["x" * 5000], "characters are accepted"),
        (["\0"], "no"),
        (["quickstart", "--optimizer.lr", "1"], "did you mean --optimizer.learning-rate?"),
        (["quickstart", "--model.num-hidden-layers", "0"], "model.num_hidden_layers"),
        (["--train.steps", "4"], "changes a configuration, and none is named"),
        (["broken.toml"], "cannot be read as TOML"),
        (["done", "--train.steps", "4"], "--train.steps: accepted with a configuration"),
        (["quickstart", "another"], "another"),
    ],
)
def test_wrong_input_is_answered_in_two_lines_with_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken.toml").write_text("[train\n")
    make_run(Path("runs/done"))
    before = sorted(tmp_path.rglob("*"))
    assert dispatch(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) <= 3  # with a note on an old name at most
    assert sorted(tmp_path.rglob("*")) == before


def make_run(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text("")
    (directory / "metrics.jsonl").write_text("")


def test_a_run_is_known_by_its_directory_and_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "runs/60m", "elsewhere"):
        make_run(Path(name))
    (Path("runs/new")).mkdir()
    Path("runs/new/config.toml").write_text("")
    assert run_of("mine", "doctor") == Path("runs/mine")
    assert run_of("runs/mine", "doctor") == Path("runs/mine")
    assert run_of("elsewhere", "doctor") == Path("elsewhere")
    assert run_of("runs/new", "doctor") is None  # without records it is a configuration
    for name in ("", "mine.toml", "nothing", "quickstart", "\0", "x" * 5000):
        assert run_of(name, "doctor") is None
    assert capsys.readouterr().err == ""
    assert run_of("60m", "doctor") is None
    assert "p828 doctor runs/60m is about the run" in capsys.readouterr().err


def test_lines_stay_within_the_width() -> None:
    for columns in (20, 40, 71, 72, 80, 200):
        lines = status_lines("kernel attention", "word " * 40, ["→ " + "note " * 20], columns)
        longest = max(len(lines[0]) + 9, *map(len, lines[1:]))
        assert longest <= max(columns, 57 if columns >= 72 else 26)
    (line,) = status_lines("name", "a\x1b[2Jb", [], 80)
    assert "\x1b" not in line


def test_a_directory_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    config, file = run_config(tmp_path), tmp_path / "file"
    file.write_text("")
    for place in (file, file / "runs" / "x", Path("/proc/none")):
        (check,) = run_directory.check_run_directory(config, place, 0)
        assert check.status == "failure"
        assert "--runs-dir" in check.remedy


def test_a_run_that_is_at_work_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    statuses = []
    with locked(directory, "held"):
        statuses += [check.status for check in run_directory.check_run_directory(None, directory, 0)]
    found = run_directory.check_run_directory(None, directory, 0)
    assert statuses[1] == "warning"
    assert found[1].status == "ok"
    assert [path.name for path in directory.iterdir()] == [".lock"]


def test_a_model_larger_than_disk_and_memory_is_a_failure(tmp_path: Path) -> None:
    config = run_config(tmp_path, model={"n_routed_experts": 2**20, "hidden_size": 2048, "moe_intermediate_size": 2048})
    found = {check.name: check for check in room.check_room(config, tmp_path / "runs" / "x", 0)}
    assert found["disk"].status == "failure"
    assert "checkpoints of" in found["disk"].text
    assert found["memory"].status == "failure"
    assert not (tmp_path / "runs").exists()


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    assert run_directory.file_system_of(Path("/proc/self")) == "proc"
    assert run_directory.file_system_of(tmp_path) not in ("", "proc")


def test_packages_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch>=99",
        "nothing-of-this-name>=1",
        "numpy",
        "ruff>=99; extra == 'dev'",
        "lm-eval>=99; extra == 'evaluate'",
    ]
    monkeypatch.setattr(versions, "requires", lambda name: asked)
    (check,) = (one for one in versions.check_versions(None) if one.name == "packages")
    assert check.status == "failure"
    assert check.text.startswith("torch 2.")
    assert check.text.endswith("is not >=99; nothing-of-this-name is missing")
    assert "pip install" in check.remedy


def test_a_runs_findings_are_told_with_cause_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run at thirty times the rate that it can bear."""
    monkeypatch.chdir(tmp_path)
    changes = {"optimizer": {"learning_rate": 5.0}, "train": {"steps": 50}, "schedule": {"warmup_steps": 0}}
    config = write_toml(tmp_path, evaluation={"every": 0, "rows": 2}, checkpoint={"every": 50}, **changes)
    assert dispatch(["train", str(config), "--name", "bad"]) == 0
    capsys.readouterr()
    assert dispatch(["doctor", "bad"]) == 1
    out, err = capsys.readouterr()
    assert "learning_rate_high" in out
    for word in ("→ cause: ", "→ to do: ", "→ rule: "):
        assert word in out
    assert "p828: runs/bad: " in err
    assert dispatch(["doctor", "runs/bad", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["step"]) == ("runs/bad", "complete", 50)
    assert "learning_rate_high" in [finding["rule"] for finding in found["findings"]]
    worst = next(finding for finding in found["findings"] if finding["severity"] == "critical")
    assert (found["health"], found["finding"]) == ("critical", worst["rule"])
    assert "unread_bytes" not in found
    assert {"rule", "severity", "step", "since", "evidence", "cause", "remedy", "reference"} <= set(
        found["findings"][0]
    )


@pytest.mark.parametrize("name", ["two-ranks", "whole-tensors"])
def test_sound_runs_of_earlier_versions_have_nothing_to_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / name
    shutil.copytree(Path(__file__).parents[1] / "data_of_old_versions" / "runs" / name, run)
    assert dispatch(["doctor", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())  # of lines that are wrapped
    assert out.startswith(f"{run}: interrupted, step 7 of 12 (")
    assert out.endswith("; no finding")
    assert dispatch(["doctor", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


def test_damaged_records_are_told_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "data_of_old_versions" / "runs" / "two-ranks", run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff no record\n", *lines[2:]]))
    assert dispatch(["doctor", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 7
    assert "line 3 is not a record" in err


def test_a_run_is_looked_at_without_pytorch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "data_of_old_versions" / "runs" / "two-ranks", run)
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "p828", "doctor", str(run)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_runs_health_is_that_of_the_findings_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run's own rules found nothing, or could not look."""
    make_run(tmp_path / "run")
    said = {"kind": "event", "step": 1, "event": "health_failed"}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(said) + "\n")
    assert dispatch(["doctor", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["findings"], found["health"], found["finding"]) == ([], "ok", "")


def broken(window: Window) -> NoReturn:
    raise ZeroDivisionError("of a rule")


def test_a_rule_that_fails_hides_no_other_ones_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("p828.health.examine.RULES", (broken, state.hang))
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "data_of_old_versions" / "runs" / "two-ranks", run)
    later = time.time() + 10
    (run / "hang.txt").write_text("no progress for 60 s\n")
    os.utime(run / "hang.txt", (later, later))
    assert dispatch(["doctor", str(run)]) == 1
    out, err = capsys.readouterr()
    assert "no progress for 60 s" in " ".join(out.split())
    assert 'raise ZeroDivisionError("of a rule")' in err, "the traceback is kept"
    assert err.count("ZeroDivisionError: of a rule") == 1
    assert err.splitlines()[-1].startswith(f"p828: {run}: hang, the rule test_doctor_command.broken failed")
    assert dispatch(["doctor", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed_rules"] == {"test_doctor_command.broken": "ZeroDivisionError: of a rule"}
    assert [finding["rule"] for finding in found["findings"]] == ["hang"]


def test_lines_that_are_no_records_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"kind": "data", "step": 0}\nodd\n{"kind": "data", "step": 0}\n[]\n'
    )
    assert dispatch(["doctor", str(tmp_path / "run")]) == 0
    assert "line 2 is not a record, and 1 more are none. They are passed over" in capsys.readouterr().err
