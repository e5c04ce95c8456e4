import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p828.runs import records
from p828.runs.records import Recorder
from p828.train.log.panels import GROUPS, SAMPLES, expert_loads, panels
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers
from runs import p828, write_toml
from tracker_records import FINDING


def run(tmp_path: Path, *flags: str) -> str:
    code, said, error = p828("train", "tiny.toml", *flags, cwd=tmp_path)
    assert code == 0, error
    assert "Traceback" not in error
    return said


Rows = dict[int, dict[str, Any]]
"""By step and name: a number, or the list of experts' loads or of samples."""


def recorded(run_dir: Path) -> Rows:
    """What metrics.jsonl has, in the form in which trackers get it."""
    found: Rows = {}
    for record in records.read(run_dir / "metrics.jsonl"):
        step, kind = record.pop("step"), record.pop("kind")
        if kind in GROUPS:
            found.setdefault(step, {}).update(panels(kind, record) | expert_loads(record))
        elif kind == "sample":
            found.setdefault(step, {})[SAMPLES] = record["samples"]
    return found


def tensorboard_rows(run_dir: Path) -> Rows:
    """What TensorBoard shows of the run, texts as they are."""
    from tensorboard.backend.event_processing import plugin_event_accumulator as events
    from tensorboard.util.tensor_util import make_ndarray

    every = dict.fromkeys(("scalars", "histograms", "text"), 0)
    shown = events.EventAccumulator(str(run_dir / "tensorboard"), {events.TENSORS: 0}, every).Reload()
    found: Rows = {}
    for tag in shown.Tags()["tensors"]:
        name = tag.removesuffix("/text_summary")
        for event in shown.Tensors(tag):
            row = found.setdefault(event.step, {})
            assert name not in row or name == "config", "a step that came again has one value"
            row[name] = shown_value(make_ndarray(event.tensor_proto))
    return found


def shown_value(tensor: Any) -> Any:
    """A number, a text, or of a histogram the bars with something in them, by their left ends."""
    if tensor.ndim == 2:
        assert (tensor[:, 1] - tensor[:, 0] == 1).all()
        return {left: count for left, _, count in tensor.tolist() if count}
    return tensor.item() if tensor.ndim == 0 else tensor[0].decode()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that both trackers follow, of six steps, and then of four more."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")
    tmp_path = tmp_path_factory.mktemp("resumed")
    write_toml(tmp_path, trackers={"tensorboard": True, "trackio": True}, train={"steps": 6})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        said = [run(tmp_path), run(tmp_path, "--train.steps", "10")]
    for text in said:
        words = " ".join(text.split())
        assert "TensorBoard tensorboard --logdir runs" in words
        assert 'trackio trackio show --project "p828", run tiny-' in words
        assert "* " not in text, "what trackio prints itself"
    return tmp_path / "runs" / "tiny"


@pytest.mark.xdist_group("trackers")  # the two that look at one run
def test_tensorboard_shows_what_metrics_jsonl_has_also_after_a_resume(resumed: Path) -> None:
    shown, rows = tensorboard_rows(resumed), recorded(resumed)
    config = shown.pop(0)["config"]
    assert "    vocab_size = 300" in config
    assert sorted(shown) == sorted(rows) == [*range(1, 11)]
    for step, row in rows.items():
        for prompt, continuation in row.pop(SAMPLES, ()):
            first = (continuation.splitlines() or [""])[0]
            assert shown[step].pop(SAMPLES).startswith(f"Prompt\n\n    {prompt}\n\nContinuation\n\n    {first}")
        assert shown[step].keys() == row.keys()
        for name, value in row.items():
            if isinstance(value, list):
                value = {expert: load for expert, load in enumerate(value) if load}
            assert shown[step][name] == pytest.approx(value, rel=1e-6), name  # TensorBoard's are float32
    assert len(list((resumed / "tensorboard").iterdir())) == 2


def test_tensorboard_drops_the_steps_before_a_rewind(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from p828.train.log.tensorboard import TensorBoardTracker

    queued = QueuedTracker(TensorBoardTracker(tmp_path))
    queued.start()
    with Recorder(tmp_path, mirror=Trackers([queued])) as recorder:
        for step in range(1, 7):
            recorder.write("step", step, loss=1.0 * step)
        recorder.write("eval", 6, loss=9.0)
        recorder.write("finding", 6, **FINDING)
        recorder.rewind(3)
        for step in range(4, 6):
            recorder.write("step", step, loss=0.5 * step)
    assert queued.problems() == []
    losses = {step: row["train/loss"] for step, row in tensorboard_rows(tmp_path).items()}
    assert losses == {1: 1.0, 2: 2.0, 3: 3.0, 4: 2.0, 5: 2.5}


FULL = """
import resource, sys
from pathlib import Path
from p828.config import from_dict
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers, asked_for
config = from_dict({"name": "run", "trackers": {sys.argv[2]: True}}, "test")
queued = QueuedTracker(asked_for(Path(sys.argv[1]), config)[0])
queued.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
trackers = Trackers([queued])
for step in range(1000):
    trackers.write("step", step, {f"number_{index}": 1.0 * step for index in range(100)})
trackers.finish(0)
"""


def script(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**clean, **environment})


@pytest.mark.parametrize(
    "name, says",
    [
        ("tensorboard", "TensorBoard is left out from here on: [Errno 27] File too large"),
        ("trackio", "trackio: failed to flush metric logs"),
    ],
    ids=["tensorboard", "trackio"],
)
def test_a_tracker_that_fills_its_disk_is_told_of(tmp_path: Path, name: str, says: str) -> None:
    pytest.importorskip(name)
    child = script(FULL, str(tmp_path), name, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith(f"p828: {says}")
    assert "Traceback" not in child.stderr


def test_a_library_that_is_not_installed_is_named_before_anything_begins(tmp_path: Path) -> None:
    for name in ("tensorboard", "trackio"):
        block = (
            "import sys; from pathlib import Path\n"
            f"sys.modules[{name!r}] = None\n"
            "from p828.config import from_dict; from p828.train.log.trackers import open_trackers\n"
            f"config = from_dict({{'name': 'run', 'trackers': {{{name!r}: True}}}}, 'test')\n"
            "open_trackers(Path(sys.argv[1]), config, print)"
        )
        child = script(block, str(tmp_path))
        assert child.returncode == 1
        assert f"trackers.{name} = true: " in child.stderr
        assert "cannot be imported: " in child.stderr
        assert f"\npip install 'p828[{name}]'" in child.stderr


@pytest.fixture
def trackio_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


TRACKIO_LOGS = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("p828")
print(json.dumps([runs, SQLiteStorage.get_logs("p828", sys.argv[1])]))
"""


@pytest.mark.xdist_group("trackers")
def test_trackio_goes_on_with_the_same_run(resumed: Path) -> None:
    name = f"tiny-{(resumed / 'trackio_id').read_text().strip()}"
    child = script(TRACKIO_LOGS, name, TRACKIO_DIR=str(resumed.parents[1] / "trackio"))
    names, logs = json.loads(child.stdout)
    assert names == [name]
    shown: Rows = {}
    for log in logs:
        shown.setdefault(log["step"], {}).update({key: plain(log[key]) for key in log if "/" in key})
    assert shown == recorded(resumed)


def plain(value: Any) -> Any:
    """trackio's histogram as its bars, and a table as its rows."""
    if not isinstance(value, dict):
        return value
    if value["_type"] == "trackio.table":
        return [list(row.values()) for row in value["_value"]]
    assert (value["_type"], value["bins"]) == ("trackio.histogram", list(range(len(value["values"]) + 1)))
    return value["values"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


SILENT_TRACKIO = """
import sys
from pathlib import Path
from p828.config import from_dict
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers
from p828.train.log.trackio import TrackioTracker
config = from_dict({"name": "run", "trackers": {"trackio": True}}, "test")
queued = QueuedTracker(TrackioTracker(Path(sys.argv[1]), config), finish_within=1)
queued.start(within=1)
trackers = Trackers([queued])
for step in range(3):
    trackers.write("step", step, {"loss": 1.0})
trackers.finish(0)
"""


def test_trackio_whose_server_never_answers_is_left(tmp_path: Path, trackio_home: Path, silent_server: str) -> None:
    environment = {"TRACKIO_DIR": str(trackio_home), "TRACKIO_SERVER_URL": f"{silent_server}/?write_token=x"}
    child = script(SILENT_TRACKIO, str(tmp_path), **environment)
    assert child.returncode == 0, child.stderr
    assert "trackio does not answer and is left as it is" in child.stderr


MANY_EXPERTS = """
import sys
from pathlib import Path
from p828.config import Config, WandbConfig
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers
from p828.train.log.wandb import WandbTracker
queued = QueuedTracker(WandbTracker(Path(sys.argv[1]), Config(name="run", wandb=WandbConfig(mode="offline"))))
queued.start()
trackers = Trackers([queued])
trackers.write("step", 1, {"load": [[*range(512)], [*range(1100)]]})
trackers.finish(0)
"""


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of W&B's, which are records of protobuf in a log of LevelDB's, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    rows: list[dict[str, Any]] = []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for the head of a part: padding
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # a whole record, or its last part
            record, parts = Record.FromString(parts), b""
            items = record.history.item
            if items:
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def test_wandb_gets_the_load_of_every_expert(tmp_path: Path) -> None:
    """A histogram of W&B's has at most 512 bars."""
    child = script(MANY_EXPERTS, str(tmp_path))
    assert child.returncode == 0, child.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (row,) = wandb_history(file)
    names = [name.removesuffix("/_type") for name, value in row.items() if value == "histogram"]
    shown = {name: list(zip(row[f"{name}/bins"], row[f"{name}/values"], strict=False)) for name in names}
    assert all(len(row[f"{name}/bins"]) == len(row[f"{name}/values"]) + 1 for name in names)
    assert shown == {
        "moe/load/layer_0": [(expert, expert) for expert in range(512)],
        "moe/load/layer_1/experts_0_to_511": [(expert, expert) for expert in range(512)],
        "moe/load/layer_1/experts_512_to_1023": [(expert, expert) for expert in range(512, 1024)],
        "moe/load/layer_1/experts_1024_to_1099": [(expert, expert) for expert in range(1024, 1100)],
    }


STOPPED_WANDB = """
import os, signal, sys
from pathlib import Path
import psutil
from p828.config import Config, WandbConfig
from p828.train.log.tracker import QueuedTracker
from p828.train.log.trackers import Trackers
from p828.train.log.wandb import CORE, WandbTracker
queued = QueuedTracker(WandbTracker(Path(sys.argv[1]), Config(name="run", wandb=WandbConfig(mode="offline"))),
                       most_rows=50, answer_within=0.5, finish_within=1)
queued.start()
(core,) = (child for child in psutil.Process().children() if child.name() == CORE)
core.send_signal(signal.SIGSTOP)
trackers = Trackers([queued])
said, step = [], 0
while not any("has taken no row" in text for text in said):  # its library keeps some rows for the process
    step += 1
    trackers.write("step", step, {f"number_{index}": 1.0 for index in range(50)})
    said += queued.problems()
print(*said)
trackers.finish(0)
"""


def test_wandb_whose_process_hangs_is_left_and_does_not_outlive_the_run(tmp_path: Path) -> None:
    child = script(STOPPED_WANDB, str(tmp_path))
    assert child.returncode == 0, child.stderr
    assert "Weights & Biases does not keep up" in child.stdout
    assert "Weights & Biases has taken no row for " in child.stdout
    assert "Weights & Biases does not answer and is left as it is" in child.stderr
    assert "Traceback" not in child.stderr
