"""`p828 bench` as it is typed."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p828.bench.batches import attended_pairs
from p828.bench.systems import load_shape
from p828.cli.main import dispatch
from p828.model.costs import training_flops
from runs import p828, start, write_toml


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), ["train", "--shape"]),
        (("generate",), ["'generate'", "train"]),
        (("train",), ["no --shape", "quickstart"]),
        (("train", "--shape", "quikstart"), ["quikstart", "did you mean quickstart?"]),
        (("train", "--shape", "none.toml"), ["none.toml"]),
        (("train", "--shape", "quickstart", "--peers", "torchtitn"), ["torchtitn", "did you mean torchtitan?"]),
        (("train", "--shape", "quickstart", "--routing", "balance"), ["balance", "did you mean balanced?"]),
        (("train", "--shape", "quickstart", "--steps", "0"), ["--steps 0", "from 1"]),
        (("train", "--shape", "quickstart", "--micro-batch-size", "-1"), ["micro_batch_size = -1", "from 1"]),
        (("train", "--shape", "quickstart", "--step", "3"), ["--step", "did you mean --steps?"]),
        (("train", "--shape", "quickstart", "--json", "none/rows.json"), ["none/rows.json", "cannot be written"]),
        (("train", "--shape", "quickstart", "--json", "."), ["--json .", "is a directory"]),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert dispatch(["bench", *arguments]) == 2
    out, said = capsys.readouterr()
    assert all(part in said for part in expected), said
    assert len(said.strip().splitlines()) <= 2
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("torchtitan") is not None:
        pytest.skip("torchtitan is installed here")
    assert dispatch(["bench", "train", "--shape", "quickstart", "--peers", "torchtitan"]) == 2
    assert "pip install torchtitan" in capsys.readouterr().err


def test_rows_with_a_peer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that cannot be imported: its last line is shown, p828 is measured all the same."""
    broken = tmp_path / "site" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('this installation is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent), prepend=os.pathsep)
    path = write_toml(tmp_path)
    code, out, err = p828(
        "bench", "train", "--shape", str(path), "--peers", "transformers", "--steps", "2", "--breakdown",
        "--gradient-accumulation", "3", "--json", "rows.json", cwd=tmp_path,
    )  # fmt: skip
    assert code == 1, err
    assert "2 of 4 systems failed" in err
    assert out.count("ImportError: this installation is broken") == 2
    assert "head and loss" in out
    assert "sinks, q/k norm and document masking: " in out
    assert "attention within documents" in out

    found = json.loads((tmp_path / "rows.json").read_text())
    assert [failed["system"] for failed in found["failed"]] == [
        "transformers, eager, experts 'eager'", "transformers, eager, experts 'grouped_mm'",
    ]  # fmt: skip
    full, plain = found["rows"]
    config = load_shape(str(path), "cpu", 0, 3)
    flops = training_flops(config.model, 2 * 32, attended_pairs(config))  # the same work for both
    assert full["breakdown"]
    assert not plain["breakdown"]
    # A norm for queries and one for keys of 8 numbers, and 4 sinks, in each of two layers.
    assert full["parameters"] - plain["parameters"] == 2 * (2 * 8 + 4)
    for row in found["rows"]:
        assert (row["framework"], row["weights"], row["moments"]) == ("p828", "float32", "float32")
        assert row["gradient_accumulation"] == 3
        assert row["tokens_per_second"] * row["ms"] / 1e3 == pytest.approx(2 * 32)
        assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / found["machine"]["matmul_flops"])
        assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(flops)
        assert row["first_step_seconds"] > 0


def test_an_interrupt_ends_the_measuring_process(tmp_path: Path) -> None:
    path = write_toml(tmp_path)
    (tmp_path / "rows.json").write_text("yesterday's")
    process = start("bench", "train", "--shape", str(path), "--steps", "1000000", "--json", "rows.json", cwd=tmp_path)
    try:
        child = _measuring_process(process)
        ended = os.pidfd_open(child)  # readable once that process has ended
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert (tmp_path / "rows.json").read_text() == "yesterday's"
    assert select.select([ended], [], [], 60)[0], "the measuring process runs on"


def _measuring_process(process: subprocess.Popen[str]) -> int:
    """The id of the process that measures the first system, once it has begun in earnest."""
    assert process.stdout is not None
    while "a micro-batch" not in (line := process.stdout.readline()):
        assert line, "ended before a system was measured"
    while process.poll() is None:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "libtorch" in Path(f"/proc/{child}/maps").read_text():
                return int(child)
    raise AssertionError("ended without a measuring process")


def test_the_measuring_process_ends_with_the_one_that_started_it() -> None:
    """Killed outright, that one has no say; its end of the pipe closes all the same."""
    command = [sys.executable, "-m", "p828.bench.child", "no-job.json", "no-result.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not out
    assert b"no-job.json" not in err, "it ended by the missing job, not with its input"
