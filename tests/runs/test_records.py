import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from odd_files import put
from p828 import config as configuration
from p828.cli.main import dispatch
from p828.errors import ConfigError, DataError, RunStopped, closed_after
from p828.optim.parts import PARTS
from p828.runs import records
from p828.runs.records import (
    LOADS_A_STEP,
    Recorder,
    load_entropy,
    loads_every,
    loads_record,
    measured_every,
    shortened,
)
from runs import write_toml


def record(run_dir: Path, first: int, last: int) -> None:
    with Recorder(run_dir) as recorder:
        for step in range(first, last + 1):
            recorder.write("step", step, loss=1 / step)
            if step % 2 == 0:
                recorder.write("eval", step, loss=1.0)
                recorder.write("sample", step, samples=[["a", "b"]])


def lines(run_dir: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in records.read(run_dir / "metrics.jsonl")]


def test_values_come_back_from_strict_json(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "loss": 0.1 + 0.2,
        "load": [[3, 0], [1, 2]],
        "nested": [math.inf, {"low": -math.inf}],
        "text": "ü\n\x1b\ud800",
        "none": None,
    }
    with Recorder(tmp_path) as recorder:
        recorder.write("step", 3, **values, bad=math.nan)
        recorder.write("sample", 3, samples=[["NaN", "Infinity"]])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in content.splitlines()] == [3, 3]
    step, sample = records.read(tmp_path / "metrics.jsonl")
    assert math.isnan(step.pop("bad"))
    assert step == {"kind": "step", "step": 3, **values}
    assert sample["samples"] == [["NaN", "Infinity"]]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in range(3):
            recorder.write("step", step)
            assert len(lines(tmp_path)) == step + 1


@pytest.mark.parametrize("cut", [1, 5, 20, 30])
def test_a_partial_last_line_is_left_out_and_the_next_line_stands_alone(tmp_path: Path, cut: int) -> None:
    record(tmp_path, 1, 1)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut])
    assert lines(tmp_path) == [("step", 1)]
    record(tmp_path, 3, 3)
    assert lines(tmp_path) == [("step", 1), ("step", 3)]


@pytest.mark.parametrize("bad", ["{", "", "[1]", '{"kind": "step"}', '{"step": 1}', "\0\0"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, bad: str) -> None:
    record(tmp_path, 1, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not a record"):
        lines(tmp_path)


def test_rewinding_leaves_one_line_a_step_after_any_number_of_kills(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(tmp_path, 1, 5)
    for saved, reached in [(4, 7), (4, 6), (0, 3), (2, 9)]:
        with path.open("ab") as file:
            file.write(b'{"kind": "step", "st')  # the kill
        with Recorder(tmp_path) as recorder:
            recorder.rewind(saved)
            recorder.write("event", saved, text="resumed")
        record(tmp_path, saved + 1, reached)
    steps = [step for kind, step in lines(tmp_path) if kind == "step"]
    evaluations = [step for kind, step in lines(tmp_path) if kind == "eval"]
    assert steps == list(range(1, 10))
    assert evaluations == [2, 4, 6, 8]
    assert [step for kind, step in lines(tmp_path) if kind == "sample"] == evaluations
    assert [step for kind, step in lines(tmp_path) if kind == "event"] == [4, 4, 0, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from p828.config import Config
from p828.errors import RecordsFailed
from p828.runs import records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = records.Recorder(Path(sys.argv[1]))
recorder.write("step", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
try:
    recorder.write("step", 2, loss=1.0)
except RecordsFailed as error:
    print(error)
"""


def test_a_full_disk_is_named_and_the_lines_before_stay(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert answer.startswith(f"{tmp_path}/metrics.jsonl: cannot be written: ")
    assert lines(tmp_path) == [("step", 1)]


def test_balance_score() -> None:
    assert load_entropy([7, 7, 7, 7]) == pytest.approx(1)
    assert load_entropy([0, 28, 0, 0]) == 0
    assert load_entropy([5, 5, 0, 0]) == pytest.approx(0.5)  # ln 2 / ln 4
    assert load_entropy([3, 1]) == pytest.approx(2 - 0.75 * math.log2(3))  # entropy in bits, of at most one bit
    assert load_entropy([9]) == 1
    assert load_entropy([0, 0]) == 1
    scores = [load_entropy([100 + uneven, 100 - uneven, 100]) for uneven in range(0, 101, 10)]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


def test_what_a_step_says_of_its_loads() -> None:
    found = loads_record([[25, 25, 25, 25], [0, 2, 38, 60], [0, 0, 0, 0]], is_whole=False)
    assert found == {
        "balance": [1, round(load_entropy([0, 2, 38, 60]), 4), 1],
        "min_share": [1, 0, 0],
        "max_share": [1, 2.4, 0],
        "starved": [0, 2, 4],  # a tenth of an even share is 2.5
    }
    loads_LE = [[1, 0], [0, 0]]
    assert loads_record(loads_LE, is_whole=True) == {"load": loads_LE, **loads_record(loads_LE, is_whole=False)}


def test_the_loads_of_a_large_model_are_recorded_now_and_then() -> None:
    assert loads_every(2, 4) == 1
    assert loads_every(12, 48) == 18
    for layers, experts in ((1, 4), (12, 8), (24, 64), (61, 256)):
        every = loads_every(layers, experts)
        assert (every - 1) * LOADS_A_STEP < layers * experts <= every * LOADS_A_STEP


OF_UPDATES = ("grad_norms", "weight_norms", "update_ratios", "changed")
OF_LAYERS = ("router_entropy", "bias_max", "bias_load_correlation", "sink_mean")


def test_a_step_of_fine_grained_takes_less_than_a_kilobyte(tmp_path: Path) -> None:
    model, draw, steps = configuration.load("fine-grained").model, random.Random(0), 180
    layers, experts = model.num_hidden_layers, model.n_routed_experts
    numbers = ("perplexity", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")

    def by_part() -> dict[str, float]:
        return {part: shortened(draw.random()) for part in PARTS}

    def by_layer() -> list[float]:
        return [shortened(draw.random()) for _ in range(layers)]

    with Recorder(tmp_path) as recorder:
        for step in range(1, steps + 1):
            loads_LE = [[draw.randrange(2 * 65536 * 6 // experts) for _ in range(experts)] for _ in range(layers)]
            recorder.write(
                "step", 400_000 + step, tokens=65536 * (400_000 + step), documents=10**8, cut_documents=10**8,
                rows="00000000", loss=draw.random() * 1e-5, memory_bytes=10**11, targets=65536, max_token=49151,
                data_seconds=shortened(draw.random() * 1e-5), host_seconds=shortened(draw.random() * 1e-5),
                **{name: by_part() for name in OF_UPDATES if step % measured_every(layers, experts) == 0},
                **{name: by_layer() for name in OF_LAYERS if step % measured_every(layers, experts) == 0},
                **{key: draw.random() * 1e-5 for key in numbers},
                **loads_record(loads_LE, is_whole=step % loads_every(layers, experts) == 0),
            )  # fmt: skip
    assert sum("load" in line for line in records.read(tmp_path / "metrics.jsonl")) == steps // 18
    assert (tmp_path / "metrics.jsonl").stat().st_size < 1000 * steps


POWER_LOSS = {  # what a file may hold in place of lines when the power has gone
    "zeros to the end": (b"\0" * 5000, b"", 0),
    "zeros, and the end of a line": (b"\0" * 5000 + b'"loss": 3}\n', b"\0" * 5000 + b'"loss": 3}\n', 1),
    "a line in pieces": (b'{"kind": "step", "st\n\n}\n', b'{"kind": "step", "st\n\n}\n', 3),
    "no text": (b"\xff\xfe\n", b"\xff\xfe\n", 1),
    "a record without its step": (b'{"kind": "step", "step": "x"}\n', b'{"kind": "step", "step": "x"}\n', 1),
}


@pytest.mark.parametrize("found, moved, count", POWER_LOSS.values(), ids=POWER_LOSS)
def test_a_run_goes_on_from_damaged_records(tmp_path: Path, found: bytes, moved: bytes, count: int) -> None:
    record(tmp_path, 1, 4)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    later = b'{"kind": "step", "step": 5}\n' if count else b""
    path.write_bytes(whole + found + later)
    with Recorder(tmp_path) as recorder:
        said = recorder.rewind(4)
    assert path.read_bytes() == whole
    assert (str(tmp_path / "metrics.damaged") in said) == (count > 0)
    if count:
        assert (tmp_path / "metrics.damaged").read_bytes() == moved
    record(tmp_path, 5, 5)
    assert lines(tmp_path)[-1] == ("step", 5)
    with Recorder(tmp_path) as recorder:
        assert recorder.rewind(4) == ""


def test_a_long_partial_line_is_cut_off(tmp_path: Path) -> None:
    record(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for rest in (b"x" * (records.PIECE - 1), b"x" * records.PIECE, b"\0" * (3 * records.PIECE + 7)):
        path.write_bytes(whole + rest)
        Recorder(tmp_path).close()
        assert path.read_bytes() == whole
    path.write_bytes(b"x" * (2 * records.PIECE))
    Recorder(tmp_path).close()
    assert path.read_bytes() == b""


KILLED = """
import os, sys
from pathlib import Path
from p828.config import Config
from p828.runs import records
recorder = records.Recorder(Path(sys.argv[1]))
os.replace = lambda *paths: os._exit(9)
recorder.rewind(2)
"""


def test_a_kill_while_records_are_rewound_changes_nothing(tmp_path: Path) -> None:
    record(tmp_path, 1, 5)
    before = lines(tmp_path)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == 9
    assert lines(tmp_path) == before
    outside = tmp_path.with_name("outside")
    outside.write_text("of someone else")
    (left,) = (path for path in tmp_path.iterdir() if path.name != "metrics.jsonl")
    left.unlink()
    left.symlink_to(outside)
    with Recorder(tmp_path) as recorder:
        recorder.rewind(2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert outside.read_text() == "of someone else"


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "link", "link to nothing"])
def test_records_are_regular_files_of_the_run(
    tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    outside = tmp_path / "outside"
    outside.write_text("of someone else")
    assert dispatch(["train", str(write_toml(tmp_path, train={"steps": 2}, evaluation={"every": 0}))]) == 0
    run = Path("runs/tiny")
    (run / name).unlink()
    put(kind, run / name, outside)
    capsys.readouterr()
    assert dispatch(["train", str(tmp_path / "tiny.toml"), "--train.steps", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"p828: runs/tiny/{name}: cannot be written: ")
    assert outside.read_text() == "of someone else"
    assert not outside.with_name("nothing").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket"])
def test_only_regular_files_are_read_as_records(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(kind, Path("metrics.jsonl"), tmp_path)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be read"):
        list(records.read(Path("metrics.jsonl")))


def test_an_error_in_closing_does_not_hide_the_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the second")

    with pytest.raises(RunStopped, match="the first"), closed_after(fail):
        raise RunStopped("the first")
    assert capsys.readouterr().err == "and then, in closing: OSError: the second\n"
    with pytest.raises(OSError, match="the second"), closed_after(fail):
        pass
    recorder: Any = Recorder(tmp_path)
    recorder.close = lambda exit_code: fail()
    with pytest.raises(RunStopped, match="the first"), recorder:
        raise RunStopped("the first")
