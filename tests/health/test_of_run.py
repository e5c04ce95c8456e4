"""A run's directory, whole or damaged, of today or of an earlier version."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from windows import changed, event, facts, healthy, write_run

from p828.config import from_dict
from p828.errors import ConfigError
from p828.files import locked
from p828.health.facts import Facts
from p828.health.finding import Finding, finding_of
from p828.health.of_run import findings_of, window_of
from p828.runs.summary import summary

OLD = Path(__file__).parents[1] / "data_of_old_versions" / "runs"


@pytest.mark.parametrize("name", ["two-ranks", "whole-tensors"])
def test_runs_of_earlier_versions_are_judged(name: str) -> None:
    assert findings_of(OLD / name) == []
    window = window_of(OLD / name)
    assert window.step == 7
    assert [saved.problem for saved in window.disk.checkpoints] == [""]  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["sharded", "deepspeed"])
def test_a_hang_lasts_as_long_as_the_engine_waits(engine: str) -> None:
    config = from_dict({"name": "run", "engine": engine, engine: {"timeout_seconds": 60}}, "run")
    assert Facts.of(config).hang_seconds == 60


def test_what_was_wrong_in_the_middle_is_found_at_the_end(tmp_path: Path) -> None:
    records = changed(healthy(400), 60, lambda r: {"max_share": [1.3, 3.1]} if r["step"] < 200 else {})
    (finding,) = findings_of(write_run(tmp_path, records))
    assert finding.rule == "load_imbalance"
    assert finding.step < 260


def test_what_the_run_said_itself_is_among_them(tmp_path: Path) -> None:
    said = Finding("slow_links", "warning", 10, 5, "evidence", "cause", "remedy", "reference")
    records = [*healthy(20), {"kind": "finding", **said.to_json()}, {"kind": "finding", "step": 3, "rule": 7}]
    assert findings_of(write_run(tmp_path, records)) == [said]
    assert finding_of({**said.to_json(), "severity": "awful"}) is None


def test_a_schedule_that_a_resume_changed_is_no_fault(tmp_path: Path) -> None:
    """config.toml has the settings of the last start, and the records before follow those of another."""
    before = healthy(100, facts(steps=100))
    resume = event("resume", 100, "resumed from step 100")
    after = [record for record in healthy(200) if record["step"] > 100]
    assert findings_of(write_run(tmp_path, [*before, resume, *after])) == []
    assert findings_of(write_run(tmp_path, before)), "without it the rates are those of another schedule"


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path, healthy(50))
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b"\x00\xff nothing\n", b'{"kind": "step"}\n', b"[1]\n", json.dumps({"kind": 3, "step": 4}).encode() + b"\n"]
    path.write_bytes(b"".join([*lines[:20], *odd, *lines[20:], b'{"kind": "step", "st']))
    assert findings_of(run) == []
    assert window_of(run).step == 50
    path.unlink()
    assert findings_of(run) == []


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run: it has no config.toml"):
        findings_of(tmp_path)


def test_a_lock_that_is_held_and_old_records_are_a_hang(tmp_path: Path) -> None:
    run = write_run(tmp_path, healthy(50))
    later = time.time() + 300
    assert findings_of(run, now=later) == []
    with locked(run, "locked"):
        assert findings_of(run) == []
        assert [finding.rule for finding in findings_of(run, now=later)] == ["hang"]
    report = run / "hang.txt"
    report.write_text("no progress for 60 s; the run ends. Where each rank is:\n  rank 0: …\n")
    os.utime(report, (later, later))
    (finding,) = findings_of(run, now=later)
    assert "no progress for 60 s" in finding.evidence


def test_rules_need_no_torch() -> None:
    code = "import sys, p828.health.of_run; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", [0, -1, True, 10**400, 1e308, "x", None, [[1]], [1, "a"], [None] * 4, {"a": "b"}])
def test_an_odd_number_under_any_key_ends_nothing(tmp_path: Path, value: object) -> None:
    records = healthy(40)
    keys = {key for record in records for key in record} - {"kind"} | {"rank_memory_bytes", "load", "rows", "aux_loss"}
    for key in sorted(keys):
        odd = [{**record, key: value} for record in records]
        run = write_run(tmp_path / key, odd)
        findings_of(run)
        summary(run)
