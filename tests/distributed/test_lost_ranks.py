"""A rank that dies or hangs ends the others, with one message that names it."""

import os
import re
import select
import shutil
import time
from itertools import product
from pathlib import Path

import pytest
from launch import (
    ENDLESS,
    OUR_LAUNCHER,
    STEPS,
    Launch,
    Stage,
    cases,
    config_that_reads_on,
    engine_of,
    launched,
    messages,
    steps,
    the_message,
    torchrun,
)

from p828.runs.file_names import HANG_FILE
from shim import Shim

pytestmark = pytest.mark.xdist_group("ranks")
A_MINUTE = 60
PLACE = r"\w+\.py:\d+ in \w+ < .+"


def patience(ranks: int) -> int:
    """Seconds, longer than to import DeepSpeed and to make a first step on a busy machine of two cores."""
    return 12 if ranks == 2 else 30


def impatient(stage: Stage, ranks: int) -> tuple[str, str]:
    return f"--{engine_of(stage)[0]}.timeout-seconds", str(patience(ranks))


def has_stack(report: str, rank: int) -> bool:
    return re.search(rf"^rank {rank}\n(Thread|Current thread) 0x", report, re.MULTILINE) is not None


@pytest.mark.parametrize(
    "stage, ranks, rank", cases([*product((1, 3, "sharded-1", "sharded-3"), (2, 4), (0, 1))], short=[(1, 2, 1)])
)
def test_a_dead_rank_is_named_and_ends_the_others(
    config: Path, tmp_path: Path, stage: Stage, ranks: int, rank: int
) -> None:
    with launched(config, tmp_path / "runs" / "dead", stage, ranks, *ENDLESS) as launch:
        launch.wait_for_step(1)
        worker = launch.workers()[rank]
        worker.kill()
        message = the_message(launch, A_MINUTE)
    assert f"rank {rank} (" in message
    assert f"process {worker.pid}) died" in message


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_ranks_that_are_started_again_go_on(config: Path, tmp_path: Path, rank: int) -> None:
    """At the first restart, and from the newest checkpoint."""
    run = tmp_path / "runs" / "again"
    launcher = (*OUR_LAUNCHER[:3], "--max-restarts", "1", *OUR_LAUNCHER[3:])
    with launched(config, run, "sharded-1", 2, launcher=launcher) as launch:
        launch.wait_for_step(9)
        launch.workers()[rank].kill()
        code, out, err = launch.end()
    assert code == 0, err
    assert re.search(r"resumed from step \d+", out) is not None, out
    assert not any("cannot join" in message for message in messages(err)), err
    assert steps(run)[-1]["step"] == STEPS


def freeze_one_of(launch: Launch, rank: int) -> str:
    """Stop a rank's process where it is; what is said when the others have ended."""
    workers = launch.workers()
    frozen = workers.pop(rank)
    # These tell of a process that ended, also if nobody has asked for its exit code yet.
    descriptors = [os.pidfd_open(worker.pid) for worker in workers]
    frozen.suspend()
    until = time.monotonic() + 2 * A_MINUTE  # patience, and three times that in which a rank has to answer
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], max(until - time.monotonic(), 0))[0]
        os.close(descriptor)
    frozen.kill()  # a launcher waits half a minute for it
    code, _, err = launch.end()
    assert code != 0
    assert len(messages(err)) == 1, err
    return err


@pytest.mark.parametrize(
    "stage, ranks, rank",
    cases([(1, 2, 1), (3, 2, 1), (3, 4, 2), ("sharded-1", 2, 1), ("sharded-3", 4, 2)], short=[(1, 2, 1)]),
)
def test_a_hang_is_reported_with_every_ranks_stack(
    config: Path, tmp_path: Path, stage: Stage, ranks: int, rank: int
) -> None:
    run = tmp_path / "runs" / "hangs"
    with launched(config, run, stage, ranks, *ENDLESS, *impatient(stage, ranks)) as launch:
        launch.wait_for_step(1)
        said = freeze_one_of(launch, rank)
    assert f"p828: no progress for {patience(ranks)} s; the run ends." in said
    report = (run / HANG_FILE).read_text()
    for other in range(ranks):
        place = "no answer" if other == rank else PLACE
        assert re.search(f"^  rank {other}: {place}$", said, re.MULTILINE), said
        assert has_stack(report, other) == (other != rank)


@pytest.mark.long
def test_when_rank_0_hangs_the_others_say_so(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "hangs"
    with launched(config, run, 1, 4, *ENDLESS, *impatient(1, 4)) as launch:
        launch.wait_for_step(1)
        said = freeze_one_of(launch, 0)
    assert f"p828: no progress for {patience(4)} s, and no answer from rank 0 (" in said
    assert "  rank 1: " in said
    report = (run / HANG_FILE).read_text()
    assert all(has_stack(report, other) for other in (1, 2, 3))


@pytest.mark.long
def test_where_all_ranks_wait_for_data_that_does_not_come(tmp_path: Path, shim: Shim) -> None:
    """The texts become links to files that are not read within the time-out."""
    config, text = config_that_reads_on(tmp_path)
    shim(file="/slow/", delay=900_000_000)
    run = tmp_path / "runs" / "hangs"
    with launched(config, run, 3, 2, *ENDLESS, *impatient(1, 2)) as launch:
        launch.wait_for_step(1)
        shutil.copytree(text, tmp_path / "slow")
        for path in text.iterdir():
            path.unlink()
            path.symlink_to(tmp_path / "slow" / path.name)
        message = the_message(launch, A_MINUTE)
    assert "no progress for 12 s; the run ends." in message
    report = (run / HANG_FILE).read_text()
    for rank in range(2):
        assert re.search(rf"^  rank {rank}: {PLACE}$", report, re.MULTILINE)
        assert has_stack(report, rank)
    assert len(re.findall(r'files\.py", line \d+ in documents', report)) == 2


RANK_0_FAILS = """
import os
import sys
import p828.train.evaluation
from p828.cli.main import dispatch
from p828.train.trainer import Trainer

step, calls = Trainer.step, []

def fail_in_the_third(self, *arguments):
    calls.append(arguments)
    if len(calls) == 3 and os.environ["RANK"] == "0":
        raise RuntimeError("made up")
    return step(self, *arguments)

def fail_in_a_pass(model, *arguments, **further):
    model.layers[0].mlp.register_forward_pre_hook(fail)
    return generate(model, *arguments, **further)

def fail(*arguments):
    raise RuntimeError("made up")

generate = p828.train.evaluation.generate
if sys.argv.pop(1) == "step":
    Trainer.step = fail_in_the_third
else:
    p828.train.evaluation.generate = fail_in_a_pass
sys.exit(dispatch(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "stage, where",
    cases([(1, "step"), ("sharded-1", "step"), ("sharded-3", "step"), ("sharded-3", "pass")], short=[(1, "step")]),
)
def test_when_rank_0_alone_fails_it_says_why_before_it_is_ended(
    config: Path, tmp_path: Path, stage: Stage, where: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_0_FAILS)
    with launched(config, tmp_path / "runs" / "fails", stage, 2, launcher=torchrun(2, str(script), where)) as launch:
        code, _, err = launch.end()
    assert code != 0
    (message,) = (line for line in err.splitlines() if line.startswith("p828: "))
    assert re.fullmatch(r"p828: rank 0 \(.+, process \d+\) failed: RuntimeError: made up", message)
    assert err.count("Traceback (most recent call last):\n  File") >= 1
    assert f"in fail{'_in_the_third' if where == 'step' else ''}\n" in err
