"""What each class of error means for the exit code, and for what a command leaves behind."""

import json
import pickle
import random
import shutil
import signal
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from p828 import errors
from p828.cli import main
from p828.cli.main import dispatch
from p828.data.text import packing
from p828.data.text.shard import BadRecord
from p828.data.tokens.directory import GOES_ON, open_output_dirs
from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError, DataError, P828Error, RunFailed, RunStopped, TransientReadError
from p828.inference.tasks import lm_eval_tasks  # noqa: F401 (its error is one of them)
from p828.runs import checkpoint, file_names
from p828.train.resume import open_run
from runs import run_config, start, wait_for_step, write_toml

EXIT_CODES = {
    "ConfigError": 2, "LocalRankError": 2, "DataError": 2, "BadRecord": 2, "DamagedCheckpoint": 2, "NotFinite": 2,
    "RunFailed": 1, "TransientReadError": 1, "RecordsFailed": 1, "TasksFailed": 1, "RunStopped": 1,
    "RunPaused": 0,
}  # fmt: skip
LINES = 120


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def classes(base: type[P828Error] = P828Error) -> Iterator[type[P828Error]]:
    for kind in base.__subclasses__():
        yield kind
        yield from classes(kind)


def test_every_class_ends_the_command_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command of our own raises each; a new class belongs into the table, and below among what a command is given."""
    found = {kind.__name__: kind for kind in classes() if kind.__module__.startswith("p828.")}
    assert found.keys() == EXIT_CODES.keys()
    for name, kind in found.items():
        error = kind("line 3 is wrong", 2) if kind is BadRecord else kind("line 3 is wrong")  # type: ignore[call-arg]

        def run(arguments: list[str], error: P828Error = error) -> None:
            raise error

        command = types.SimpleNamespace(run=run)
        monkeypatch.setattr(main, "_module", lambda _, command=command: command)
        assert dispatch(["evaluate"]) == EXIT_CODES[name], name
        assert capsys.readouterr().err == "p828: line 3 is wrong\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> None:
        raise KeyError("a mistake in the program")

    monkeypatch.setattr(main, "_module", lambda _: types.SimpleNamespace(run=run))
    with pytest.raises(KeyError):
        dispatch(["evaluate"])


def text_file(path: Path, bad_line: int | None = None) -> str:
    """Lines of JSON, of which one, numbered from 0, may be none."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdef", k=draw.randint(2, 6))) for _ in range(40)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(LINES)]
    if bad_line is not None:
        lines[bad_line] = '{"text": oops}'
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def tokenizer_file(here: Path) -> str:
    """A tokenizer, so that nothing reads the text before the first step does."""
    toml = str(write_toml(here, train={"steps": 3}, evaluation={"every": 0, "prompts": []}))
    assert dispatch(["train", toml, "--name", "other"]) == 0
    (here / "runs" / "other" / "tokenizer.json").rename(here / "tokenizer.json")
    return str(here / "tokenizer.json")


def train_toml(here: Path, bad_line: int | None, name: str = "train") -> str:
    return str(
        write_toml(
            here,
            data={
                "files": [text_file(here / "text.jsonl", bad_line)], "shuffle_rows": 2, "block_documents": 3,
                "validation": {"kind": "files", "files": [str(here / "text" / "*.txt")]},
            },
            tokenizer={"name": name}, evaluation={"every": 0, "prompts": []}, checkpoint={"every": 1000},
        )
    )  # fmt: skip


@pytest.mark.parametrize("flags", [["--model.hiden-size", "32"], ["--data.files", "none/*.txt"], []])
def test_a_run_that_cannot_begin_leaves_nothing(here: Path, flags: list[str]) -> None:
    """By a flag, by the name of a file, and by a line that the tokenizer's training or the first batch meets."""
    assert dispatch(["train", train_toml(here, bad_line=0), *flags]) == 2
    assert not (here / "runs").exists()


def test_a_bad_line_is_wrong_input_at_the_start_and_a_failure_at_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 2)  # so that so short a text is not read before the first step
    tokenizer = tokenizer_file(here)
    assert dispatch(["train", train_toml(here, 0, tokenizer)]) == 2
    assert not (here / "runs" / "tiny").exists()
    capsys.readouterr()
    assert dispatch(["train", train_toml(here, 16, tokenizer)]) == 1
    said = capsys.readouterr().err
    assert "text.jsonl:17: not a line of JSON" in said
    assert "which is saved; the same command goes on from there" in said
    step = file_names.step_of(checkpoint.resolve(here / "runs" / "tiny"))
    assert f"The run stops after step {step}, " in said
    assert dispatch(["train", train_toml(here, None, tokenizer)]) == 0


def test_a_run_stopped_by_its_guard_and_one_that_is_asked_to_end(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = str(write_toml(here, train={"steps": 3000}, evaluation={"every": 0, "prompts": []}))
    assert dispatch(["train", toml, "--name", "hot", "--optimizer.learning-rate", "1e30"]) == 1
    assert "3 steps in a row" in capsys.readouterr().err
    assert (here / "runs" / "hot" / "metrics.jsonl").exists()
    process = start("train", toml, cwd=here)
    wait_for_step(process, 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.startswith("p828: stopped by SIGTERM after step ")


@pytest.mark.parametrize("error", [ConfigError("wrong"), DataError("wrong"), TransientReadError("away")])
def test_a_start_that_fails_removes_what_it_made(here: Path, error: P828Error) -> None:
    config = run_config(here)

    def begin() -> None:
        with open_run(config, ProcessGroup()) as run:
            (run.path / "tokenizer.json").write_text("{}")
            raise error

    with pytest.raises(type(error)):
        begin()
    assert not (here / "runs").exists()


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("error", [ConfigError("wrong"), DataError("wrong"), RunFailed("full"), RunStopped("NaN")])
def test_a_run_that_holds_something_is_kept(here: Path, error: P828Error, is_begun: bool) -> None:
    """A checkpoint, or whatever it has once it has begun."""
    config = run_config(here)

    def run() -> None:
        with open_run(config, ProcessGroup()) as run:
            if is_begun:
                run.keep()
            else:
                (run.path / "checkpoints" / "step_00000001").mkdir(parents=True)
            raise error

    with pytest.raises(type(error)):
        run()
    assert (config.run_dir / "config.toml").exists()
    assert (config.run_dir / "checkpoints" / "step_00000001").exists() != is_begun


def test_another_run_begun_in_a_directory_that_a_failed_start_made_stays(here: Path) -> None:
    def begin() -> None:
        with open_run(run_config(here), ProcessGroup()):
            (here / "runs" / "other").mkdir()
            raise ConfigError("wrong")

    with pytest.raises(ConfigError):
        begin()
    assert [path.name for path in (here / "runs").iterdir()] == ["other"]


def test_a_preparation_that_fails_at_work_is_kept_and_one_that_cannot_begin_is_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_file(here)
    flags = ["--data.prepared", "prepared/here"]
    for bad_line, code in ((0, 2), (100, 1)):
        toml = train_toml(here, bad_line, tokenizer)
        capsys.readouterr()
        assert dispatch(["prepare", toml, *flags]) == code
        said = capsys.readouterr().err
        assert f"text.jsonl:{bad_line + 1}: not a line of JSON" in said
        assert said.endswith(f"{GOES_ON}\n") == (code == 1)
        assert Path("prepared").exists() == (code == 1)


def test_a_damaged_directory_after_one_that_was_prepared_is_a_failure_at_work(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"source": "files", "files": [str(here / "text" / "*.txt")]}
    mixture = [{"name": name, "prepared": name, **files} for name in ("one", "two")]
    toml = str(write_toml(here, data={"mixture": mixture}))
    assert dispatch(["prepare", toml]) == 0
    shard = Path("two/training-00000.tokens")
    shard.write_bytes(bytes(shard.stat().st_size))
    for code in (2, 1):  # the first one is complete, then it is made anew
        capsys.readouterr()
        assert dispatch(["prepare", toml]) == code
        said = capsys.readouterr().err
        assert "two/training-00000.tokens: damaged or changed" in said
        assert said.endswith(f"{GOES_ON}\n") == (code == 1)
        shutil.rmtree("one")


def test_text_that_leaves_nothing_to_validate_on_keeps_what_was_made(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After hours of work, perhaps; where nothing was made it is wrong input."""
    (here / "short.txt").write_text("ab")
    toml = str(write_toml(here, data={"validation": {"kind": "files", "files": ["short.txt"]}}))
    flags = ["--data.prepared", "prepared", "--prepare.min-characters", "10"]
    assert dispatch(["prepare", toml, *flags]) == 1
    assert "nothing is left for validation" in capsys.readouterr().err
    assert any(path.stat().st_size for path in Path("prepared").glob("training-*"))


def test_a_users_file_put_into_a_directory_meanwhile_stays(here: Path) -> None:
    def prepare() -> None:
        with open_output_dirs([here / "prepared"]):
            (here / "prepared" / "notes.txt").write_text("mine")
            (here / "prepared" / "tokenizer.json").write_text("{}")
            raise DataError("wrong")

    with pytest.raises(DataError):
        prepare()
    assert [path.name for path in (here / "prepared").iterdir()] == ["notes.txt"]


def test_one_suggestion_is_made_if_a_word_is_near() -> None:
    assert errors.did_you_mean("trian", ["train", "prepare"]) == "; did you mean train?"
    assert errors.did_you_mean("xyz", ["train", "prepare"]) == "."


def test_a_bad_record_can_be_told_to_another_rank() -> None:
    error = BadRecord("text.jsonl:4: not a line of JSON", 3)
    error.args = ("rank 1: text.jsonl:4: not a line of JSON",)
    error.is_everywhere = True
    told = pickle.loads(pickle.dumps(error))
    assert (str(told), told.record, told.is_everywhere) == ("rank 1: text.jsonl:4: not a line of JSON", 3, True)
