"""What is wrong is said once, whatever the number of ranks, and nothing is begun."""

import sys
from pathlib import Path

import pytest
from launch import ENDLESS, OUR_LAUNCHER, cases, launched, messages, the_message, torchrun

pytestmark = pytest.mark.xdist_group("ranks")

TWICE = ('{"zero_optimization": {"stage": 1, "stage": 2}}', '"stage" is given twice, as 1 and as 2')
CONTRADICTION = ('{"train_micro_batch_size_per_gpu": 99}', "train.micro_batch_size")


@pytest.mark.parametrize(
    "content, expected", cases([TWICE, CONTRADICTION], short=[TWICE]), ids=["twice", "contradiction"]
)
def test_a_deepspeed_file(config: Path, tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with launched(config, tmp_path / "runs" / "wrong", 1, 2, "--deepspeed-config", str(path)) as launch:
        _, _, err = launch.end()
    (message,) = messages(err)
    assert str(path) in message
    assert expected in message
    assert f"  traceback : {message}\n" in err.partition("Root Cause")[2], "torchrun's report ends with it, too"
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_second_launch_on_the_same_run(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "busy"
    with launched(config, run, 1, 2, *ENDLESS) as first:
        first.wait_for_step(1)
        with launched(config, run, 3, 2) as second:
            assert "another p828 train is at work on this run" in the_message(second)
        assert first.process.poll() is None


@pytest.mark.long
def test_missing_data(config: Path, tmp_path: Path) -> None:
    flags = ["--data.files", str(tmp_path / "none" / "*.txt")]
    with launched(config, tmp_path / "runs" / "wrong", 3, 2, *flags) as launch:
        assert "none/*.txt" in the_message(launch)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--engine", "plain"), 'engine = "plain" trains on one device, not on 2: '),
        (("--engine", "sharded", "--deepspeed.offload-optimizer", "cpu"), 'accepted with engine = "deepspeed"'),
        (("--optimizer.moment-dtype", "bfloat16"), 'optimizer.moment_dtype = "bfloat16": accepted in bfloat16 runs'),
    ],
)
def test_what_cannot_be_done_on_several_processes(
    config: Path, tmp_path: Path, flags: tuple[str, ...], expected: str
) -> None:
    with launched(config, tmp_path / "runs" / "wrong", None, 2, *flags, launcher=OUR_LAUNCHER) as launch:
        code, _, err = launch.end()
    assert code == 2
    (message,) = messages(err)
    assert expected in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--sharded.stage 3", "sharded.stage: rank 1 was given 3, and rank 0 1"),
        ("--engine deepspeed", "engine: rank 1 was given 'deepspeed', and rank 0 'plain'"),
        ("--train.seed 5", "train.seed: rank 1 was given 5, and rank 0 0"),
    ],
)
def test_other_settings_on_another_rank(config: Path, tmp_path: Path, flags: str, expected: str) -> None:
    """As where a command is typed on each host."""
    line = f'[ $RANK = 0 ] || set -- "$@" {flags}; exec {sys.executable} -m p828 "$@"'
    launcher = torchrun(2, "--no-python", "sh", "-c", line, "sh")
    with launched(config, tmp_path / "runs" / "wrong", None, 2, launcher=launcher) as launch:
        assert the_message(launch) == f"p828: {expected}; all ranks need the same"
    assert not (tmp_path / "runs").exists()
