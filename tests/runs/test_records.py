import json
import math
import os
import pty
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from p828 import config as configuration
from p828.cli.main import dispatch
from p828.config import Config, WandbConfig
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
from p828.train.log.board_id import board_id
from runs import p828, start, wait_for_step, write_toml


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


def put(kind: str, path: Path, outside: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir(parents=True)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "link to nothing":
        path.symlink_to(outside.with_name("nothing"))
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


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


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 12, b"a/b", b"a b", b"x" * 200, "fifo", "directory", "link to nothing"]
)
def test_a_wandb_id_that_is_none_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "wandb_id"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        put(content, path, tmp_path / "outside")
    with pytest.raises(ConfigError, match=r"wandb_id: (holds no id|cannot be read)"):
        board_id(path, "Weights & Biases")


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


def started_wandb(run_dir: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, at a terminal, so that a prompt for a key would wait for ever."""
    script = (
        "import sys; from pathlib import Path\n"
        "from p828.config import Config, WandbConfig; from p828.errors import ConfigError\n"
        "from p828.train.log.trackers import open_trackers\n"
        "config = Config(name='run', wandb=WandbConfig(mode=sys.argv[2]))\n"
        "try: open_trackers(Path(sys.argv[1]), config, lambda text: None).finish(0)\n"
        "except ConfigError as error: print(error); sys.exit(2)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    main, terminal = pty.openpty()
    try:
        return subprocess.run(
            [sys.executable, "-c", script, str(run_dir), mode],
            stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60,
            env={**clean, "HOME": str(run_dir), "NETRC": str(run_dir / "netrc"), **environment},
        )  # fmt: skip
    finally:
        os.close(main)
        os.close(terminal)


def test_wandb_online_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    child = started_wandb(tmp_path, "online")
    assert child.returncode == 2
    first, second = child.stdout.splitlines()
    assert first.startswith('wandb.mode = "online": Weights & Biases does not start: ')
    assert "API key" in first
    assert "wandb login" in second
    assert "WANDB_API_KEY" in second
    assert "offline" in second


def test_wandb_that_cannot_be_reached_is_written_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toml(tmp_path, wandb={"mode": "online"})
    nobody = "http://127.0.0.1:9"  # the discard port: connections are refused
    for name, value in (("API_KEY", "0" * 40), ("BASE_URL", nobody), ("INIT_TIMEOUT", "1")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    code, said, error = p828("train", "tiny.toml", cwd=tmp_path)
    assert code == 0, error
    assert "Weights & Biases cannot be reached" in said
    assert "recorded offline" in said
    run = tmp_path / "runs" / "tiny"
    (event,) = (line for line in records.read(run / "metrics.jsonl") if line.get("event") == "wandb")
    assert "connection refused" in event["text"]
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    logged, _, _ = read_wandb(path)
    assert logged["train/loss"]


def test_a_run_outlives_wandb(tmp_path: Path) -> None:
    path = write_toml(tmp_path, wandb={"mode": "offline"}, train={"steps": 300}, evaluation={"every": 0})
    process = start("train", str(path), cwd=tmp_path)
    wait_for_step(process, 10)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Weights & Biases is left out from here on" in said
    assert "Traceback" not in error


def test_wandb_that_has_no_directory_to_write_to_is_reported(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file")
    child = started_wandb(tmp_path, "offline")
    assert (child.returncode, child.stdout) == (2, f"{tmp_path}/wandb: cannot be written: Not a directory\n")


OFFLINE = """
import sys
from contextlib import suppress
from pathlib import Path
from p828 import errors
from p828.config import Config, WandbConfig
from p828.runs.records import Recorder, loads_record
from p828.train.log.trackers import open_trackers
error = getattr(errors, sys.argv[2])
mirror = open_trackers(Path(sys.argv[1]), Config(name="run", wandb=WandbConfig(mode="offline")), print)
with suppress(error), Recorder(Path(sys.argv[1]), mirror=mirror) as recorder:
    assert mirror.shown() == [("Weights & Biases", "offline, in " + sys.argv[1] + "/wandb")]
    loads = loads_record([[1, 2, 0, 1], [3, 1, 0, 0]], is_whole=True)
    by_part = {"router": 0.5, "head": 1.5}
    more = {"balance": [0.5, 0.25], "router_entropy": [0.25, 0.5], "grad_norms": by_part}
    recorder.write("step", 1, loss=2.5, perplexity=12.2, **loads | more)
    recorder.write("eval", 1, loss=2.25)
    recorder.write("tasks", 1, results={"letters": {"acc": 0.25}})
    recorder.write("sample", 1, samples=[["ab", "cd"]])
    recorder.write("event", 1, text="hello")
    texts = {"evidence": "12 at step 1", "cause": "the rate", "remedy": "a lower one", "reference": "a paper"}
    recorder.write("finding", 1, rule="divergence", severity="critical", since=1, **texts)
    if error is errors.RunStopped:
        for step in range(2, 7):
            recorder.write("step", step, loss=1.0 * step)
        recorder.rewind(3)
        for step in range(4, 9):
            recorder.write("step", step, loss=0.5 * step)
            if step == 6:
                recorder.write("eval", step, loss=1.25)
    raise error
"""


def test_wandb_offline_gets_flat_names_the_configuration_and_one_id(tmp_path: Path) -> None:
    for error in ("RunPaused", "RunStopped"):
        command = [sys.executable, "-c", OFFLINE, str(tmp_path), error]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        first = (tmp_path / "wandb_id").read_text().strip()
    runs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in runs] == 2 * [f"run-{first}.wandb"]
    exit_codes = [record.exit.exit_code for path in runs for record in wandb_records(path) if record.HasField("exit")]
    assert exit_codes == [0, 1], "paused is no failure"
    check_rows_after_a_rewind(runs[1])
    (alert,) = (record.alert for record in wandb_records(runs[0]) if record.HasField("alert"))
    assert (alert.title, alert.level) == ("divergence", "ERROR")
    assert alert.text == "12 at step 1\nCause: the rate\nTo do: a lower one"
    logged, config, name = read_wandb(runs[0])
    assert logged.pop("step") == 1
    (table,) = runs[0].parent.glob("files/" + logged["val/samples/path"])
    shown = json.loads(table.read_text())
    assert (shown["columns"], shown["data"]) == (["prompt", "continuation"], [["ab", "cd"]])
    assert [logged[f"moe/load/layer_0/{key}"] for key in ("values", "bins")] == [[1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert logged["moe/load/layer_1/values"] == [3, 1, 0, 0]
    assert {key: value for key, value in logged.items() if not key.startswith(("_", "val/samples", "moe/load"))} == {
        "train/loss": 2.5,
        "train/perplexity": 12.2,
        "val/loss": 2.25,
        "val/letters/acc": 0.25,
        "moe/min_share": 0,
        "moe/min_share/layer_0": 0,
        "moe/min_share/layer_1": 0,
        "moe/max_share": 3,
        "moe/max_share/layer_0": 2,
        "moe/max_share/layer_1": 3,
        "moe/starved": 3,
        "moe/starved/layer_0": 1,
        "moe/starved/layer_1": 2,
        "moe/router_entropy": 0.25,
        "moe/router_entropy/layer_0": 0.25,
        "moe/router_entropy/layer_1": 0.5,
        "moe/balance": 0.25,
        "moe/balance/layer_0": 0.5,
        "moe/balance/layer_1": 0.25,
        "health/grad_norms/head": 1.5,
        "health/grad_norms/router": 0.5,
    }
    assert logged["_step"] == 1
    assert (name, config["name"], config["model"]["n_routed_experts"]) == ("run", "run", 4)
    assert set(config) >= set(Config.__dataclass_fields__)


def check_rows_after_a_rewind(path: Path) -> None:
    """Of the steps that came again both rows are there, the new one later; W&B's own steps only grow."""
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.HasField("history")
    ]
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    losses = {row["step"]: row["train/loss"] for row in rows}
    assert losses == {1: 2.5, 2: 2, 3: 3, 4: 2, 5: 2.5, 6: 3, 7: 3.5, 8: 4}
    assert [row["step"] for row in rows if "val/loss" in row] == [1, 6]
    metrics = {record.metric.glob_name or record.metric.name: record.metric for record in wandb_records(path)}
    assert metrics["*"].step_metric == "step"


def read_wandb(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The one row of history, the configuration and the run's name."""
    logged: dict[str, Any] = {}
    config: dict[str, Any] = {}
    name = ""
    for record in wandb_records(path):
        for item in record.history.item:
            logged[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("run"):
            name = record.run.display_name
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return logged, config, name


def wandb_records(path: Path) -> Iterator[Any]:
    """W&B's own messages in one of its files.

    The file is LevelDB's log format (7 bytes of ident; then records, in blocks of 32 KiB, with CRC, length and
    type: 1 whole, 2 first, 3 middle, 4 last) of W&B's own messages.
    """
    from wandb.proto import wandb_internal_pb2

    content, position, data = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (2, 3):
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        data = b""
        yield record


def test_wandb_is_not_imported_when_off(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from p828.config import Config; from p828.train.log.trackers import open_trackers\n"
        "assert open_trackers(Path(sys.argv[1]), Config(name='run'), print) is None\n"
        "assert not {'wandb', 'tensorboard', 'trackio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert WandbConfig().mode == "off"
