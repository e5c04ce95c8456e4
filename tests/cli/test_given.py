"""What a user gives has the effect that it names, or is refused in a line; what a preset gives is not the user's."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p828 import config, load_config
from p828.cli.main import dispatch
from p828.config import Config
from p828.config.values import to_dict
from runs import write_text, write_toml


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert dispatch(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("p828: ")
    assert len(said.splitlines()) <= 2
    assert not Path("runs").exists()
    return said


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> Config:
    """The configuration that a dry run prints."""
    capsys.readouterr()
    assert dispatch(["train", *arguments, "--dry-run"]) == 0, capsys.readouterr().err
    Path("resolved.toml").write_text(capsys.readouterr().out)
    return config.load("resolved.toml")


@pytest.mark.parametrize(
    "flags, key, accepted",
    [
        (["--schedule.decay-steps", "5"], "schedule.decay_steps = 5", '"wsd"'),
        (["--schedule.kind", "constant", "--schedule.min-lr-ratio", "0.5"], "schedule.min_lr_ratio = 0.5", "cosine"),
        (["--schedule.warmup-steps", "51", "--train.steps", "50"], "schedule.warmup_steps = 51", "train.steps = 50"),
        (["--schedule.warmup-steps", "50", "--train.steps", "50"], "schedule.warmup_steps = 50", "train.steps = 50"),
        (["--deepspeed.stage", "2"], "deepspeed.stage = 2", 'engine = "deepspeed"'),
        (["--deepspeed.stage", "1"], "deepspeed.stage = 1", 'engine = "deepspeed"'),
        (["--deepspeed.timeout-seconds", "60"], "deepspeed.timeout_seconds = 60", 'engine = "deepspeed"'),
        (["--deepspeed_config", "zero2"], "deepspeed.config", 'engine = "deepspeed"'),
        (["--engine", "sharded", "--deepspeed.offload-param", "cpu"], "deepspeed.offload_param", '"deepspeed"'),
        (["--engine", "sharded", "--sharded.offload-param", "cpu"], "sharded.offload-param", "deepspeed.offload-param"),
        (["--data.source", "python", "--data.files", "x"], "data.files = ['x']", 'data.source = "files"'),
        (["--data.source", "files", "--data.files", "x", "--data.hub-name", "y"], "data.hub_name = 'y'", '"hf"'),
        (["--data.files", "x", "--data.hub-name", "y"], "data.files and data.hub_name", "data.source"),
        (["--data.hub-subset", "en"], "data.hub_subset = 'en'", '"hf"'),
        (["--data.text-field", "content"], "data.text_field = 'content'", '"files"'),
        (
            ["--data.validation.kind", "held_out", "--data.validation.files", "x"],
            "data.validation.files = ['x']",
            'data.validation.kind = "files"',
        ),
        (
            ["--data.validation.kind", "files", "--data.validation.files", "x", "--data.validation.fraction", "0.1"],
            "data.validation.fraction = 0.1",
            '"held_out"',
        ),
        (
            ["--data.validation.files", "x", "--data.validation.fraction", "0.1"],
            "data.validation.files",
            "validation.kind",
        ),
        (["--tokenizer.name", "x.json", "--tokenizer.vocab-size", "500"], "tokenizer.vocab_size = 500", '"train"'),
        (["--tokenizer.name", "x.json", "--tokenizer.training-megabytes", "5"], "training_megabytes = 5", '"train"'),
        (["--prepare.min-characters", "9"], "prepare.min_characters = 9", "data.prepared"),
        (["--data.prepared", "x", "--data.streams", "2"], "data.streams = 2", "without data.prepared"),
        (["--model.rope-scaling.beta-fast", "40"], "model.rope_scaling.beta_fast = 40.0", "factor above 1"),
        (["--rollback.limit", "4"], "rollback.limit = 4", "rollback.after_steps"),
        (["--evaluation.patience", "4", "--evaluation.every", "0"], "evaluation.patience = 4", "evaluation.every"),
        (["--wandb.project", "mine"], "wandb.project = 'mine'", "wandb.mode"),
        (["--trackers.trackio-project", "mine"], "trackers.trackio_project = 'mine'", "trackers.trackio = true"),
    ],
)
def test_flags_that_would_change_nothing(
    flags: list[str], key: str, accepted: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, "train", "quickstart", *flags)
    assert key in said
    assert accepted in said


@pytest.mark.parametrize(
    "sections, key",
    [
        ({"schedule": {"decay_steps": 5}}, "schedule.decay_steps = 5"),
        ({"schedule": {"warmup_steps": 20}}, "schedule.warmup_steps = 20"),
        ({"deepspeed": {"stage": 2}}, "deepspeed.stage = 2"),
        ({"data": {"source": "python"}}, "data.files = "),
        ({"data": {"hub_name": "x"}}, "data.hub_name = 'x'"),
        ({"data": {"validation": {"kind": "held_out", "files": ["x"]}}}, "data.validation.files = ['x']"),
        ({"prepare": {"drop_duplicates": True}}, "prepare.drop_duplicates = true"),
        ({"wandb": {"project": "mine"}}, "wandb.project = 'mine'"),
        (
            {"data": {"mixture": [{"name": "a", "source": "python", "files": ["x"]}]}},
            "data.mixture[0].files = ['x']",
        ),
    ],
)
def test_keys_of_a_toml_that_would_change_nothing(
    sections: dict[str, Any], key: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert key in complaint(capsys, "train", str(write_toml(here, **sections)))


def test_a_mixture_has_no_revision_of_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_toml(here, data={"mixture": [{"name": "a", "source": "python"}]}))
    assert "data.hub_revision = 'x': accepted without" in complaint(capsys, "train", path, "--data.hub-revision", "x")


def test_a_base_that_the_user_wrote_counts_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.toml").write_text('base = "quickstart"\n[deepspeed]\nstage = 2\n')
    Path("mine.toml").write_text('base = "base.toml"\n')
    assert "deepspeed.stage = 2" in complaint(capsys, "train", "mine.toml")


def test_a_shorter_mixture_in_place_of_a_bases(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = '[[data.mixture]]\nname = "a"\nfiles = ["x"]\n'
    Path("base.toml").write_text('base = "quickstart"\n' + tables + '[[data.mixture]]\nname = "b"\nfiles = ["y"]\n')
    Path("mine.toml").write_text('base = "base.toml"\n' + tables)
    assert [source.name for source in resolved(capsys, "mine.toml").data.mixture] == ["a"]


def test_what_flags_make_idle_in_a_toml_is_accepted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file for several ways of training, and a flag that picks one."""
    path = str(write_toml(here, engine={}, deepspeed={"stage": 2}, schedule={"kind": "wsd", "decay_steps": 3}))
    Path(path).write_text(Path(path).read_text().replace("[engine]\n", ""))
    Path(path).write_text('engine = "deepspeed"\n' + Path(path).read_text())
    assert resolved(capsys, path, "--engine", "plain", "--schedule.kind", "cosine").engine == "plain"
    assert resolved(capsys, path, "--train.steps", "3", "--schedule.kind", "cosine").schedule.warmup_steps == 2
    prepared = str(write_toml(here, prepare={"min_characters": 5}))
    assert resolved(capsys, prepared, "--data.prepared", "x").prepare.min_characters == 5


def test_a_presets_keys_are_not_the_users(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60m names a hub data set, a split and a warm-up of 2,000 steps."""
    found = resolved(capsys, "60m", "--data.files", "x.txt", "--train.steps", "100")
    assert (found.data.source, found.data.files) == ("files", ("x.txt",))
    assert found.data.validation.kind == "held_out", "the preset's split belongs to the preset's data"


def test_a_whole_configuration_gives_nothing_in_particular(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What p828 wrote can be given to it again, as it is and changed by flags."""
    for preset in config.preset_names():
        whole = config.with_vocabulary(config.load(preset))
        Path("whole.toml").write_text(tomli_w.dumps(to_dict(whole)))
        assert resolved(capsys, "whole.toml") == whole
    assert resolved(capsys, "whole.toml", "--data.files", "x.txt").data.source == "files"


@pytest.mark.parametrize(
    "flags, source, kind",
    [
        (["--data.files", "x.txt"], "files", "held_out"),
        (["--data.files", "x.txt", "--data.validation.files", "y.txt"], "files", "files"),
        (["--data.validation.files", "y.txt"], "python", "files"),
        (["--data.hub-name", "x"], "hf", "held_out"),
        (["--data.validation.hub-name", "x"], "python", "split"),
    ],
)
def test_files_imply_what_they_are_for(
    flags: list[str], source: str, kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = resolved(capsys, "quickstart", *flags).data
    assert (data.source, data.validation.kind) == (source, kind)


def test_files_in_a_toml_imply_the_source(here: Path) -> None:
    Path("mine.toml").write_text('base = "60m"\n[data]\nfiles = ["x.txt"]\n[data.validation]\nfiles = ["y.txt"]\n')
    data = config.load("mine.toml").data
    assert (data.source, data.validation.kind) == ("files", "files")
    Path("mixed.toml").write_text('[[data.mixture]]\nname = "a"\nfiles = ["x"]\n[[data.mixture]]\nhub_name = "y"\n')
    assert [mixed.source for mixed in config.load("mixed.toml").data.mixture] == ["files", "hf"]


def test_given_files_are_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here / "own", documents=20)
    flags = [
        "--train.steps",
        "1",
        "--evaluation.every",
        "0",
        "--evaluation.rows",
        "2",
        "--data.validation.fraction",
        "0.2",
    ]
    assert dispatch(["train", "quickstart", "--name", "own", "--data.files", "own/*.txt", *flags]) == 0
    written = config.load("runs/own/config.toml")
    assert (written.data.source, written.data.files) == ("files", ("own/*.txt",))


def test_a_run_goes_on_from_its_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_toml(here, evaluation={"every": 0}))
    assert dispatch(["train", path, "--train.steps", "4", "--optimizer.learning-rate", "0.02"]) == 0
    Path("runs").rename("moved")
    capsys.readouterr()
    assert dispatch(["train", "moved/tiny", "--train.steps", "6"]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    assert config.load("moved/tiny/config.toml").optimizer.learning_rate == 0.02
    assert config.load("moved/tiny").runs_dir == "moved"
    assert not Path("runs").exists()
    assert dispatch(["train", "moved/tiny/"]) == 0
    assert "resumed from step 6" in capsys.readouterr().out


def test_a_directory_that_is_no_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("books").mkdir()
    assert "books' is a directory, but no run: it holds no config.toml" in complaint(capsys, "train", "books")
    assert "runs/gone" in complaint(capsys, "train", "runs/gone")


def test_text_in_place_of_a_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("text")
    said = complaint(capsys, "train", "book.txt")
    assert "'book.txt' is no configuration" in said
    assert "p828 train quickstart --data.files FILE" in said


@pytest.mark.parametrize("where", ["flag", "file", "base"])
def test_the_plain_engine_is_refused_on_several_processes(
    where: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, another engine is taken; a run's own file is what was taken before, and not what a user gave."""
    path = write_toml(here)
    Path("given.toml").write_text('engine = "plain"\n' + path.read_text())
    Path("based.toml").write_text('base = "given.toml"\n')
    arguments = {"flag": ["tiny.toml", "--engine", "plain"], "file": ["given.toml"], "base": ["based.toml"]}[where]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    said = complaint(capsys, "train", *arguments, "--dry-run")  # which would not wait for the other process
    assert 'engine = "plain" trains on one device, not on 2' in said
    assert resolved(capsys, "tiny.toml").engine == "plain"
    assert load_config("resolved.toml").engine == "plain"
