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
        ((), ["train", "generate", "the word is missing"]),
        (("generat",), ["'generat'", "did you mean generate?"]),
        (("generate",), ["no --shape", "quickstart"]),
        (("generate", "--shape", "60n"), ["60n", "did you mean 60m?"]),
        (("generate", "--shape", "60m", "--batch", "0"), ["--batch 0", "from 1 to 4096"]),
        (("generate", "--shape", "60m", "--batch", "1", "x"), ["--batch", "a whole number"]),
        (("generate", "--shape", "60m", "--batch"), ["--batch is empty"]),
        (("generate", "--shape", "60m", "--new-tokens", "-1"), ["--new-tokens -1", "from 1"]),
        (("generate", "--shape", "60m", "--prompt-length", "0"), ["--prompt-length 0", "from 1"]),
        (("generate", "--shape", "60m", "--peers", "vllm"), ["--peers vllm", "llama.cpp"]),
        (("generate", "--shape", "60m", "--steps", "3"), ["--steps"]),
        (("generate", "--shape", "60m", "--json", "none/rows.json"), ["none/rows.json", "cannot be written"]),
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


FAULTY = """
from p828.bench.generation.generator import Timed
from p828.bench.systems import System

PEERS = ("slow", "broken")

def peer_systems(config, peers, device):
    return [System(name, name, config, {"module": "generators"}) for name in peers]

def missing(peer, device):
    return None

class Slow:
    dtype = "float32"

    def steps(self, prompts, steps, is_sampled):
        print("a library's talk")
        if len(prompts) == 3:
            raise MemoryError("no room for 3")
        return Timed(1000.0 * len(prompts), 10.0)

    def first_token(self, prompt):
        return len(prompt) / 2

def build(system):
    if system.framework == "broken":
        raise ImportError("cannot be built")
    return Slow()
"""


def test_rows_of_generation_with_peers_that_fail(tmp_path: Path) -> None:
    """A peer whose answers are known fails at one batch, and another at all: the rest is measured all the same."""
    folder = tmp_path / "benchmarks" / "peers"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "systems.py").touch()
    (folder / "generators.py").write_text(FAULTY)
    path = write_toml(tmp_path)
    code, out, err = p828(
        "bench", "generate", "--shape", str(path), "--peers", "slow", "broken", "--batch", "1", "3", "2",
        "--prompt-length", "8", "--new-tokens", "4", "--json", "rows.json", "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert code == 1, err
    assert "2 of 12 measurements failed" in err
    assert "MemoryError: no room for 3" in out
    assert "ImportError: cannot be built" in out
    assert "for all: model.attention_sinks = False" in out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(failed["system"], failed["item"].split(",")[0]) for failed in found["failed"]] == [
        ("slow", "batch 3"), ("broken", "batch 1"),
    ]  # fmt: skip
    slow = [row for row in found["rows"] if row["system"] == "slow"]
    own = [row for row in found["rows"] if row["system"] == "p828"]
    assert [(row["batch"], row["ms"]) for row in slow if row["kind"] == "steps"] == [(1, 1e6), (2, 2e6)]
    assert [(row["prompt_length"], row["ms"]) for row in slow if row["kind"] == "first token"] == [
        (512, 256e3), (2048, 1024e3),
    ]  # fmt: skip
    assert [row["batch"] for row in own if row["kind"] == "steps"] == [1, 3, 2]
    assert [row["kind"] for row in own[3:]] == ["first token", "first token", "recompute"]
    rate = found["machine"]["bytes_per_second"]
    for row in own[:3]:
        assert row["tokens_per_second"] * row["ms"] / 1e3 == pytest.approx(row["batch"])
        assert row["memory_share"] * rate * row["ms"] / 1e3 == pytest.approx(row["step_bytes"])
        assert row["sampled_tokens_per_second"] > 0


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
    command = [sys.executable, "-m", "p828.bench.child", "no-job.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not out
    assert b"no-job.json" not in err, "it ended by the missing job, not with its input"
