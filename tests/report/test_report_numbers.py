"""What a report reads of a run, against plain sums over its records."""

import base64
import json
import math
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_runs import STEPS, step_record, write_run

from p828.cli.main import dispatch
from p828.config import load
from p828.errors import ConfigError
from p828.health.of_run import findings_of
from p828.health.window import Window
from p828.plan.plan import Machine, make_plan
from p828.report.buckets import edges, means, places, thinned
from p828.report.heat_map import LEVELS_PER_DOUBLING, MIDDLE, MOST, HeatMap
from p828.report.page import page
from p828.report.run import ReportedRun
from p828.report.series import Series, compare_rows
from p828.report.watch import ReportServer
from p828.system.cards import card


@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=200), st.integers(1, 20))
def test_no_extreme_is_lost_in_thinning(values: list[float], buckets: int) -> None:
    curve, starts = np.array(values, dtype=np.float32), edges(len(values), buckets)
    shown = thinned(curve, starts)
    assert len(shown) == len(places(np.arange(len(values), dtype=float), starts))
    if len(values) <= 2 * buckets:
        np.testing.assert_array_equal(shown, curve)
        return
    ends = [*starts[1:], len(values)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        inside = [value for value in values[start:end] if not math.isnan(value)]
        pair = shown[2 * number : 2 * number + 2]
        if inside:
            assert sorted(pair) == [min(inside), max(inside)]
        else:
            assert np.isnan(pair).all()


def test_means_pass_gaps_over() -> None:
    curve = np.array([1, 3, math.nan, 5, math.nan, math.nan], dtype=np.float32)
    found = means(curve, np.array([0, 2, 4]))
    np.testing.assert_array_equal(found, np.array([2, 2, 5, 5, math.nan, math.nan], dtype=np.float32))


def test_a_column_has_a_number_for_every_step() -> None:
    series = Series()
    for record in ({"loss": 4.0}, {"loss": math.inf, "mfu": 0.5}, {"grad_norms": {"head": 2}, "balance": [0.5, 1.0]}):
        series.add({"step": len(series) + 1, "seconds": 3600.0, "tokens": 7, **record})
    found = {name: series.column(name).tolist() for name in series.columns}
    gap = math.nan
    wanted = {
        "loss": [4, gap, gap],
        "mfu": [gap, 0.5, gap],
        "grad_norms.head": [gap, gap, 2],
        "balance": [gap, gap, 0.75],
        "balance_least": [gap, gap, 0.5],
        "seconds": [3600, 3600, 3600],
    }
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    assert series.axes()["hours"].tolist() == [1, 2, 3]


def test_steps_that_come_again_replace_those_before() -> None:
    series = Series()
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 5.0)):
        series.add({"step": step, "loss": loss})
    assert list(series.steps) == [1, 2]
    assert series.column("loss").tolist() == [1, 5]


def test_runs_are_compared_by_their_rows() -> None:
    one, other = Series(), Series()
    for step, rows in ((1, "0000000a"), (2, "0000000b"), (3, None), (4, "ffffffff")):
        one.add({"step": step, "rows": rows})
    for step, rows in ((2, "0000000b"), (3, "0000000c"), (4, "ffffffff"), (5, "00000001")):
        other.add({"step": step, "rows": rows})
    assert compare_rows(one, other) == (2, None)
    other.add({"step": 4, "rows": "fffffffe"})
    assert compare_rows(one, other) == (2, 4)


def test_the_heat_map_has_the_mean_share_of_each_column() -> None:
    heat_map, draw = HeatMap(), np.random.default_rng(0)
    loads_TLE = draw.integers(1, 100, (3 * MOST, 2, 4))
    for step, load_LE in enumerate(loads_TLE, start=1):
        heat_map.add(step, load_LE.tolist())
    found = heat_map.to_json()
    assert found is not None
    columns = len(found["first"])
    bytes_TLE = np.frombuffer(base64.b64decode(found["shares"]), np.uint8).reshape(columns, 2, 4)
    shares_TLE = loads_TLE / loads_TLE.mean(axis=2, keepdims=True)
    for number, (first, last) in enumerate(zip(found["first"], found["last"], strict=True)):
        mean_LE = shares_TLE[first - 1 : last].mean(axis=0)
        shown_LE = 2 ** ((bytes_TLE[number].astype(float) - MIDDLE) / LEVELS_PER_DOUBLING)
        # half a level of rounding
        np.testing.assert_allclose(shown_LE, mean_LE, rtol=2 ** (0.5 / LEVELS_PER_DOUBLING) - 1 + 1e-9)
    assert MOST / 2 <= columns <= MOST


@pytest.mark.parametrize("load", [None, "x", [[1, 2], [3]], [[-1, 2]], [1, 2], [[math.inf, 1]], []])
def test_what_is_no_load_is_left_out(load: object) -> None:
    heat_map = HeatMap()
    heat_map.add(1, load)
    assert heat_map.to_json() is None


def test_a_growing_file_is_read_on_and_a_new_one_again(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=5)
    run, file = ReportedRun(path, with_rules=False), path / "metrics.jsonl"
    assert len(run.series) == 5
    assert not run.update()
    line = json.dumps(step_record(6))
    with file.open("a") as appended:
        appended.write(line[:20])
    run.update()
    assert len(run.series) == 5
    with file.open("a") as appended:
        appended.write(line[20:] + "\n")
    assert run.update()
    assert list(run.series.steps) == [1, 2, 3, 4, 5, 6]
    anew = path / "new"
    anew.write_text(json.dumps(step_record(1)) + "\n")
    anew.replace(file)
    assert run.update()
    assert list(run.series.steps) == [1]
    assert run.overview()["evaluations"] == []


def test_records_that_no_run_writes_are_read_all_the_same(tmp_path: Path) -> None:
    path, odd = write_run(tmp_path / "run", steps=2), 10**400
    lines = [
        "no record", "[1]", '{"kind": "step", "step": -5}', '{"kind": "step", "step": true}',
        json.dumps({"kind": "step", "step": 3, "loss": odd, "tokens": odd, "seconds": "NaN", "balance": [odd, odd]}),
        json.dumps({"kind": "step", "step": 4, "loss": [1], "grad_norms": {"head": "x"}, "balance": [], "rows": 7}),
        '{"kind": "eval", "step": 4, "loss": "NaN"}', '{"kind": "sample", "step": 4, "samples": [1, ["a"], []]}',
        '{"kind": "finding", "step": 4}', '{"kind": "event", "step": 4, "event": ["resume"]}',
        '{"kind": "event", "step": 4, "event": "started", "command": ["x"], "versions": "x", "device": 7}',
    ]  # fmt: skip
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines)
    run = ReportedRun(path)
    assert list(run.series.steps) == [1, 2, 3, 4]
    assert "".join(page([run]))


def test_text_of_a_run_ends_no_element(tmp_path: Path) -> None:
    run = ReportedRun(write_run(tmp_path / "run", steps=5), with_rules=False)
    text = "".join(page([run]))
    payload = text.partition('id="payload">')[2].partition("</script>")[0]
    (shown,) = json.loads(payload)["runs"]
    assert shown["findings"][0]["evidence"].endswith("</script>")
    assert shown["findings"][0]["since"] == STEPS // 2
    assert "<img" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run: it holds no config\.toml; a run's directory"):
        ReportedRun(tmp_path)


def test_a_report_is_written_and_wrong_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "one", steps=3), tmp_path / "page.html"
    assert dispatch(["report", "--out", str(out), str(run)]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    for arguments, told in (
        ([], "no RUN is named"),
        ([str(tmp_path / "on")], f"did you mean {run}?"),
        ([str(run), "--out", str(tmp_path)], "is a directory"),
        ([str(run), "--out", str(run / "metrics.jsonl")], "exists and is no HTML page"),
        ([str(run), "--port", "80"], "accepted with --watch"),
        ([str(run), "--watch", "--out", str(out)], "accepted without --watch"),
    ):
        assert dispatch(["report", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_a_watched_page_is_for_this_machine_only(tmp_path: Path) -> None:
    with ReportServer([ReportedRun(write_run(tmp_path / "run", steps=3), with_rules=False)], port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            statuses = {}
            for path, host in (("/", "evil.example"), ("/data?after=0", "localhost"), ("/detail/0/loss", "localhost"),
                               ("/detail/0/no", "localhost"), ("/detail/7/loss", "localhost")):  # fmt: skip
                request = urllib.request.Request(server.url[:-1] + path, headers={"Host": host})
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        statuses[path] = answer.status
                except urllib.error.HTTPError as error:
                    statuses[path] = error.code
        finally:
            server.shutdown()
            thread.join()
    assert list(statuses.values()) == [403, 204, 200, 404, 404]


def test_of_a_cpu_the_length_is_planned(tmp_path: Path) -> None:
    """Steps of 4 rows of 256 tokens as configured, beside the made-up records' 100 a step."""
    config = "[train]\nsteps = 40\nmicro_batch_size = 4\ngradient_accumulation = 1\n\n[data]\nsequence_length = 256\n"
    plan = ReportedRun(write_run(tmp_path / "run", steps=10, config=config), with_rules=False).overview()["plan"]
    assert plan["rows"] == [
        {"name": "steps", "planned": "40", "real": "10", "share": "25%"},
        {"name": "tokens", "planned": "40,960", "real": "1,000", "share": "2%"},
    ]


def test_a_run_of_another_version_is_shown_without_the_rules(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=5, config="[train]\nsteps = 5\nwarp = 3\n")
    overview = ReportedRun(path).overview()
    assert "unknown key train.warp" in overview["problem"]
    assert [finding["rule"] for finding in overview["findings"]] == ["spike"]
    assert (overview["count"], overview["settings"]["train.warp"]) == (5, "3")
    (path / "config.toml").write_text("[train")
    assert ReportedRun(path).overview()["count"] == 5


def test_the_rules_look_at_a_run_as_it_goes_on(tmp_path: Path) -> None:
    """After the start step 100 has a token id that the model has no row for; p828 doctor finds the same."""
    path = write_run(tmp_path / "run", steps=5, config="[train]\nsteps = 400\n\n[model]\nvocab_size = 1024\n")
    run = ReportedRun(path)
    assert "token_out_of_vocabulary" not in {finding.rule for finding in run.findings}
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(6, 300):
            file.write(json.dumps({**step_record(step), "max_token": 5000 if step == 100 else 7}) + "\n")
    assert run.update()
    assert [finding.since for finding in run.findings if finding.rule == "token_out_of_vocabulary"] == [100]
    assert run.findings == findings_of(path)
    assert not run.update()


def test_the_last_start_says_by_which_command(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=5)
    assert ReportedRun(path, with_rules=False).overview()["about"]["command"].startswith("not recorded; p828 train ")
    starts = [
        {"kind": "event", "event": "started", "step": step, "command": f"p828 train x --train.steps {step + 5}",
         "device": "2 x cuda (NVIDIA H100 80GB HBM3)", "versions": {"p828": "0.1.0", "git": "abc"}} for step in (0, 5)
    ]  # fmt: skip
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(start) + "\n" for start in starts)
    overview = ReportedRun(path, with_rules=False).overview()
    about = overview["about"]
    assert (about["command"], about["versions"]) == ("p828 train x --train.steps 10", "p828 0.1.0, git abc")
    assert about["device"] == "2 x cuda (NVIDIA H100 80GB HBM3)"
    assert [event["text"] for event in overview["events"]] == [start["command"] for start in starts]


def test_the_plan_is_for_the_gpus_that_the_log_names(tmp_path: Path) -> None:
    """Of 2 H100s what `p828 plan` says; beside it what the made-up records have: 0.5 s a step and 1 GB."""
    config = "[train]\nsteps = 6000\n\n[model]\nvocab_size = 1024\n\n[deepspeed]\nstage = 1\n"
    run = write_run(tmp_path / "run", steps=20, config='engine = "deepspeed"\n' + config)
    overview = ReportedRun(run, with_rules=False).overview()
    assert [row["name"] for row in overview["plan"]["rows"]] == ["steps", "tokens"]
    (run / "log.txt").write_text("2026-01-01 00:00:00   device     2 x cuda (NVIDIA H100 80GB HBM3) in bfloat16\n")
    plan = ReportedRun(run, with_rules=False).overview()["plan"]
    rows = {row["name"]: row for row in plan["rows"]}
    wanted = make_plan(load(str(run / "config.toml")), Machine(card("h100"), 2))
    assert plan["remark"] == "Planned for 2 × h100."
    assert rows["seconds a step"]["planned"] == f"{wanted.configured.time.seconds:.3g}"
    assert [rows[name]["real"] for name in ("seconds a step", "memory a GPU, GB", "steps")] == ["0.5", "1", "20"]


def test_a_rule_that_fails_hides_no_other_ones_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(window: Window) -> NoReturn:
        raise ZeroDivisionError("of a rule")

    monkeypatch.setattr("p828.health.examine.RULES", (broken,))
    told: list[str] = []
    run = ReportedRun(write_run(tmp_path / "run"), told.append)
    run.update()
    assert [finding.rule for finding in run.findings] == ["spike"], "what the run itself found"
    assert run.overview()["problem"].endswith(".broken failed, and is left out")
    (text,) = told
    assert "broken failed, which is a fault of p828's" in text
    assert 'raise ZeroDivisionError("of a rule")' in text
