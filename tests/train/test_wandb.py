import json
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from odd_files import put
from p828.config import Config, WandbConfig
from p828.errors import ConfigError
from p828.runs import records
from p828.train.log.board_id import board_id
from runs import p828, start, wait_for_step, write_toml

pytestmark = pytest.mark.xdist_group("wandb")  # a group begins early, and what takes long would be left for the end


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
    assert "127.0.0.1:9" in event["text"]
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
