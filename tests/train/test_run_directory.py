"""What lies in a run's directory, and checkpoints that were moved out of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from p828.config import Config, load
from p828.config.old_names import under_old_names
from p828.runs.manifest import describe, manifest_bytes
from runs import write_text, write_toml

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, standard output and standard error of `p828 ARGUMENTS`."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = dispatch(list(arguments))
        return code, *capsys.readouterr()

    return run


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_killed_processes_left_is_swept(here: Path, command: Command) -> None:
    path = str(write_toml(here))
    assert command("train", path, "--train.steps", "4")[0] == 0
    run = here / "runs" / "tiny"
    left = [".config.toml.tmp", ".tokenizer.json.tmp", ".wandb_id.4711", ".config.toml.12"]
    for name in left:
        (run / name).write_text("half")
    (run / "checkpoints" / ".step_00000008.tmp").mkdir()
    (run / "checkpoints" / ".step_00000008.tmp" / "model.safetensors").write_text("half")
    (run / ".trial" / "saving").mkdir(parents=True)
    (run / ".mine").write_text("kept")
    assert command("train", path)[0] == 0
    assert sorted(found.name for found in run.iterdir() if found.name.startswith(".")) == [".lock", ".mine"]
    assert all(name.startswith("step_") for name in saved_steps(run))


def test_checkpoints_on_another_disk_and_by_themselves(here: Path, command: Command) -> None:
    path = str(write_toml(here))
    run, disk = here / "runs" / "tiny", here / "disk"
    disk.mkdir(parents=True)
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    code, _, said = command("train", path)
    assert code == 2
    assert "is not a run" in said
    (run / "checkpoints").unlink()
    assert command("train", path, "--train.steps", "4")[0] == 0
    shutil.copytree(run / "checkpoints", disk, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(disk)
    assert command("train", path)[0] == 0
    alone = here / "alone"
    shutil.copytree(disk / "step_00000012", alone)
    said = {}
    for given in ("runs/tiny", str(disk), "alone"):
        code, out, error = command("evaluate", given)
        assert code == 0, error
        said[given] = out.splitlines()[1:]
        assert command("generate", given, "--prompt", "ab", "--max-new-tokens", "2")[0] == 0
    assert said["runs/tiny"] == said[str(disk)] == said["alone"]
    make_older(disk / "step_00000012")
    code, out, error = command("evaluate", "runs/tiny")
    assert code == 0, error
    assert out.splitlines()[1:] == said["alone"]
    code, out, error = command("train", path, "--train.steps", "14")
    assert code == 0, error
    assert "resumed from step 12" in out


def test_a_link_to_a_disk_that_is_not_there_is_named(here: Path, command: Command) -> None:
    (here / "runs" / "tiny").mkdir(parents=True)
    (here / "runs" / "tiny" / "checkpoints").symlink_to(here / "unmounted")
    for wanted in (["evaluate", "runs/tiny"], ["generate", "runs/tiny", "--prompt", "ab"]):
        said = (2, "", f"p828: runs/tiny/checkpoints is a link to {here}/unmounted, which is not there\n")
        assert command(*wanted) == said


def make_older(path: Path) -> None:
    """As it was before checkpoints had their tokenizer."""
    (path / "tokenizer.json").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"], manifest["files"]["tokenizer.json"]
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))


def test_an_older_checkpoint_is_not_used_without_a_word(here: Path, command: Command) -> None:
    path = str(write_toml(here))
    assert command("train", path)[0] == 0
    newest = here / "runs" / "tiny" / "checkpoints" / "step_00000012"
    (newest / "optimizer.safetensors").unlink()
    for arguments in (("evaluate", "runs/tiny"), ("generate", "runs/tiny", "--prompt", "a", "--max-new-tokens", "1")):
        code, _, said = command(*arguments)
        assert code == 0
        assert said.splitlines()[0] == (
            "p828: runs/tiny/checkpoints/step_00000012: optimizer.safetensors is missing; step_00000010 is used instead"
        )


def test_a_refused_resume_leaves_the_configuration(here: Path, command: Command) -> None:
    path = str(write_toml(here))
    assert command("train", path)[0] == 0
    before = (here / "runs" / "tiny" / "config.toml").read_bytes()
    other = write_text(here / "other", seed=1)
    code, _, said = command("train", path, "--train.steps", "14", "--data.files", str(other))
    assert code == 2
    assert "not the data of the checkpoint" in said
    assert (here / "runs" / "tiny" / "config.toml").read_bytes() == before
    assert command("train", "runs/tiny", "--train.steps", "14")[0] == 0
    assert b"steps = 14" in (here / "runs" / "tiny" / "config.toml").read_bytes()


def test_a_run_with_nothing_left_to_train_says_so(here: Path, command: Command) -> None:
    path = str(write_toml(here))
    assert "nothing is left" not in command("train", path)[1]
    for steps in ("12", "8"):
        code, out, _ = command("train", "runs/tiny", "--train.steps", steps)
        assert code == 0
        assert f"nothing is left to train with train.steps = {steps}: a larger number trains the run longer" in out
    assert "nothing is left" not in command("train", "runs/tiny", "--train.steps", "13")[1]


def test_a_run_with_old_names_goes_on(here: Path, command: Command) -> None:
    """Its configuration is the run's own, so nothing is told of it; what is written has today's names."""
    path = str(write_toml(here, rollback={"after_steps": 2, "spike_threshold": 0.5}))
    assert command("train", path)[0] == 0
    run = here / "runs" / "tiny"
    with_old_names(run)
    for flags in (["--train.steps", "13"], ["--train.steps", "14", "--data.validation.fraction", "0.2"]):
        code, out, said = command("train", "runs/tiny", *flags)
        assert (code, said) == (0, "")
        assert "train.steps = 1" in out
        assert "fraction" not in out
        assert "spike" not in out
    assert "\nfraction = 0.2\n" in (run / "config.toml").read_text()
    assert "\nspike_threshold = 0.5\n" in (run / "config.toml").read_text()
    code, _, said = command("train", "runs/tiny", "--data.validation.share", "0.3")
    assert code == 2
    assert "data.validation.fraction = 0.2, now 0.3" in said


def with_old_names(run: Path) -> None:
    """A run's configuration and its newest checkpoint as they were before keys were renamed."""
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        text.replace("\nfraction = ", "\nshare = ").replace("spike_threshold", "spike_nats")
    )
    path = sorted((run / "checkpoints").iterdir())[-1]
    state = json.loads((path / "state.json").read_text())
    state["config"] = under_old_names(Config, state["config"])
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = describe(path / "state.json")
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))


@pytest.mark.parametrize(
    "flags, is_accepted",
    [
        (["--model.hidden-size", "48"], False),
        (["--model.mask-documents", "False"], False),
        (["--train.seed", "1"], False),
        (["--data.shuffle-rows", "4"], False),
        (["--model.dropout", "0.1"], True),
        (["--model.rope-scaling.factor", "2"], True),
        (["--data.bad-records", "skip"], True),
        (["--evaluation.rows", "3"], True),
    ],
)
def test_what_may_change_on_the_way(flags: list[str], is_accepted: bool, here: Path, command: Command) -> None:
    path = str(write_toml(here, train={"steps": 3}, evaluation={"every": 0, "prompts": [], "rows": 2}))
    assert command("train", path)[0] == 0
    code, out, said = command("train", path, "--train.steps", "4", *flags)
    key = flags[0].removeprefix("--").replace("-", "_")
    assert code == (0 if is_accepted else 2), said
    assert f"{key} = " in (out if is_accepted else said)
    assert is_accepted or "was started with other settings" in said


def test_a_change_that_no_step_follows_is_not_kept(here: Path, command: Command) -> None:
    """Else config.toml would say YaRN of a model whose checkpoint, and so its export, has none."""
    path = str(write_toml(here, train={"steps": 3}, evaluation={"every": 0, "prompts": [], "rows": 2}))
    assert command("train", path)[0] == 0
    run = here / "runs" / "tiny"
    before = (run / "config.toml").read_bytes()
    flags = ["--model.rope-scaling.factor", "2"]
    code, out, _ = command("train", str(run), *flags)
    assert code == 0
    assert "model.rope_scaling.factor = 1.0, now 2.0" in out
    assert "config.toml and the checkpoint keep their settings" in out
    assert (run / "config.toml").read_bytes() == before
    assert command("train", str(run), *flags, "--train.steps", "4")[0] == 0
    assert load(str(run)).model.rope_scaling.factor == 2
