import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from p828.cli.main import dispatch
from p828.config import from_dict
from p828.verify.kill_resume import KillResumeCheck, shortened
from runs import start, write_toml


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return str(write_toml(tmp_path, model={"dropout": 0.1}, train={"steps": 40}))


def test_a_proof(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what a failed one has left, which stays."""
    evidence = Path("runs/tiny-prove-resume/output.txt")
    evidence.parent.mkdir(parents=True)
    evidence.touch()
    assert dispatch(["prove-resume", toml, "--kills", "3", "--seed", "828"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert len(re.findall(r"^kill \d of 3: at step \d+ of 40(?:, while a checkpoint was written)?$", said, re.M)) == 3
    assert re.search(r"^the same, bit for bit, through 3 kills, \d of them while a checkpoint was written", said, re.M)
    assert list(Path("runs").iterdir()) == [evidence.parent]
    assert evidence.exists()
    stages = ["is left from another proof", "--seed 828", "training 40 steps at once", "kill 1 of 3", "kill 3 of 3"]
    places = [said.index(stage) for stage in [*stages, "resumed, to its end", "comparing", "the same, bit for bit"]]
    assert places == sorted(places)


def test_a_seed_draws_the_same_kills(tmp_path: Path) -> None:
    config = shortened(from_dict({"name": "tiny", "train": {"hours": 3.0}}, "tiny"), tmp_path)
    assert config.train.hours == 0
    first, again, other = (KillResumeCheck(config, tmp_path, 5, seed=seed)._moments() for seed in (1, 1, 2))
    assert first == again != other
    unseeded = KillResumeCheck(config, tmp_path, 5)
    assert KillResumeCheck(config, tmp_path, 5, seed=unseeded.seed)._moments() == unseeded._moments()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.long) for other in (signal.SIGHUP, signal.SIGINT))],
)
def test_a_signal_ends_the_run_that_is_at_work_too(toml: str, number: signal.Signals) -> None:
    process = start("prove-resume", toml, "--train.steps", "60", cwd=Path.cwd())
    said = Path("runs/tiny-prove-resume/output.txt")
    while not (said.exists() and "step 1/60" in said.read_text()):
        assert process.poll() is None
        time.sleep(0.01)  # between two looks at what it has written
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("train" in child.cmdline() for child in children)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.count("\n") == 1
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not list(Path("runs").iterdir()), "nothing is left of the two runs"


def test_a_difference_is_reported_and_kept(
    toml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of another seed in place of the one that is resumed."""
    dumps = tomli_w.dumps

    def with_its_own_seed(values: dict[str, Any]) -> str:
        return dumps({**values, "train": {**values["train"], "seed": int(values["name"] == "killed")}})

    monkeypatch.setattr(tomli_w, "dumps", with_its_own_seed)
    assert dispatch(["prove-resume", toml, "--kills", "2"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^p828: NOT the same, through 2 kills, .*: model: .* numbers of .* differ$", said, re.M)
    assert Path("runs/tiny-prove-resume/whole/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--kills", "1"], "--kills 1: a whole number of at least 2"),
        (["--kills", "many"], "--kills many: a whole number"),
        (["--seed", "-1"], "--seed -1: a whole number of at least 0"),
        (["--ranks", "2"], '--ranks 2: accepted with --engine sharded or deepspeed; engine = "plain"'),
        (["--resume-ranks", "2"], "--resume-ranks: accepted with --ranks"),
        (["--ranks", "2", "--resume-ranks", "3", "--engine", "deepspeed"], "a divisor of a step's 4 micro-batches"),
        (["--kill", "3"], "unknown flag --kill; did you mean --kills?"),
        (["--train.steps", "61"], "train.steps = 61: in a proof at most 60 is accepted"),
        (["--train.tokens", "1e6"], "train.steps = 7813: in a proof at most 60 is accepted"),
        (["--train.hours", "1"], "train.hours = 1.0: in a proof 0.0 is accepted"),
        (["--train.deterministic", "false"], "train.deterministic = false: in a proof true is accepted"),
        (["--checkpoint.every", "7"], "checkpoint.every = 7: in a proof 3 is accepted"),
        (["--evaluation.every", "7"], "evaluation.every = 7: in a proof 13 is accepted"),
        (["--wandb.mode", "offline"], "wandb.mode = 'offline': in a proof 'off' is accepted"),
        (["--trackers.tensorboard"], "trackers.tensorboard = true: in a proof false is accepted"),
    ],
)
def test_wrong_input(toml: str, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert dispatch(["prove-resume", toml, *flags]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
