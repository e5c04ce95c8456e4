"""A run of several ranks is a run like any other, under either launcher."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launch import (
    ENDLESS,
    MICRO_BATCHES,
    OUR_LAUNCHER,
    WITHIN,
    Run,
    assert_same_training,
    flags_of,
    launched,
    messages,
    records_of,
    torchrun,
)

from p828.cli.main import dispatch
from p828.config import load

pytestmark = pytest.mark.xdist_group("ranks")


def test_evaluate_and_generate_read_it(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole(3, 2)
    assert dispatch(["evaluate", str(run), "--device", "cpu"]) == 0
    found = re.search(r"^loss +(\S+) ", capsys.readouterr().out, re.MULTILINE)
    assert found
    # Printed with five digits.
    assert float(found[1]) == pytest.approx(records_of(run, "eval")[-1]["loss"], abs=1e-5)
    arguments = ["--prompt", "ab", "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"]
    texts = []
    for of_run in (run, whole(None, 1)):
        assert dispatch(["generate", str(of_run), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"


@pytest.mark.long
def test_a_step_that_changes_with_the_ranks_is_reported(
    config: Path, whole: Run, copied: Callable[[Path], Path]
) -> None:
    run = copied(whole(1, 2))
    more = ["--train.steps", "21", "--schedule.kind", "constant"]
    with launched(config, run, 1, 1, *more, "--train.gradient-accumulation", str(MICRO_BATCHES // 2)) as launch:
        code, out, err = launch.end()
    assert code == 0, err
    assert "ranks = 2, now 1: a step had 8 rows, and has 4; --train.gradient-accumulation 4 keeps that" in out


@pytest.mark.long
def test_an_engine_is_chosen_for_several_processes(config: Path, whole: Run, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "chosen"
    with launched(config, run, None, 2, launcher=torchrun(2)) as launch:
        code, out, err = launch.end()
    assert code == 0, err
    assert (out + err).count('2 processes: engine = "sharded", ZeRO stage 1\n') == 1
    assert_same_training(run, whole(None, 1))


def launch_script(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GPUS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parents[2] / "launch_distributed.sh"
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, engine",
    [((), "sharded"), (("--deepspeed_config", "zero2"), "deepspeed"), (flags_of(3, 2)[2:], "deepspeed")],
)
def test_the_launch_script(config: Path, whole: Run, tmp_path: Path, flags: Sequence[str], engine: str) -> None:
    done = launch_script(tmp_path, str(config), *flags_of(None, 2), *flags)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "runs" / "tiny", whole(None, 1))
    assert load(str(tmp_path / "runs" / "tiny")).engine == engine


def test_the_launch_script_without_a_configuration(tmp_path: Path) -> None:
    for arguments in ((), ("--train.steps", "3")):
        done = launch_script(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr == "usage: bash launch_distributed.sh CONFIG [--section.key VALUE ...]\n"


# Ends well in any case: a launcher ends the other ranks as soon as one has failed.
AND_THEN = """
import sys
import torch.distributed
from p828.cli.main import dispatch

code = dispatch(sys.argv[1:])
where = "still in a group" if torch.distributed.is_initialized() else "on its own"
sys.stdout.write(f"{code} {where}\\n")  # at once: all ranks share it
"""
NO_DATA = ("--data.files", "none/*.txt")
NO_NUMBERS = ("--optimizer.learning-rate", "1e30")


@pytest.mark.long
@pytest.mark.parametrize("flags, expected", [((), 0), (NO_DATA, 2), (NO_NUMBERS, 1)])
def test_every_rank_leaves_its_process_groups(
    config: Path, tmp_path: Path, flags: tuple[str, ...], expected: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(AND_THEN)
    with launched(config, tmp_path / "runs" / "left", 3, 2, *flags, launcher=torchrun(2, str(script))) as launch:
        _, out, err = launch.end()
    assert len(messages(err)) == (1 if expected else 0), err
    assert out.count(f"{expected} on its own") == 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.long
def test_deepspeeds_launcher(config: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which counts cores as if they were GPUs
    script = str(Path(sys.executable).with_name("deepspeed"))
    launcher = [script, "--num_gpus", "2", "--master_port", str(free_port()), "--module", "p828"]
    run = tmp_path / "runs" / "deepspeed"
    with launched(config, run, 1, 2, launcher=launcher) as launch:
        code, _, err = launch.end()
    assert code == 0, err
    assert_same_training(run, whole(None, 1))


def test_ctrl_c_at_our_launcher_saves_and_says_one_line(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "asked"
    with launched(config, run, 1, 2, *ENDLESS, launcher=OUR_LAUNCHER) as launch:
        launch.wait_for_step(1)
        launch.process.send_signal(signal.SIGINT)
        code, _, err = launch.end()
    assert code == 0, err
    (line,) = filter(None, err.splitlines())
    assert line.startswith("p828: stopped by SIGINT after step ")


@pytest.mark.long
def test_our_launcher_ends_with_the_ranks_exit_code(config: Path, tmp_path: Path) -> None:
    with launched(config, tmp_path / "runs" / "wrong", 1, 2, *NO_DATA, launcher=OUR_LAUNCHER) as launch:
        code, _, err = launch.end()
    assert code == 2
    assert len(messages(err)) == 1, err
