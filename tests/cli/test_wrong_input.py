"""Wrong input is answered in one or two lines that name it, with exit code 2, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from p828.cli.main import dispatch
from runs import in_process, p828, write_toml

QUICK = ("--train.steps", "1", "--evaluation.every", "0")


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `p828 ARGUMENTS` says on standard error, checked for its form."""
    capsys.readouterr()
    code = dispatch(list(arguments))
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("p828: ")
    assert 1 <= len(said.strip().splitlines()) <= 2, said
    assert "Traceback" not in said
    return said


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("trian", "quickstart"), ["trian", "did you mean train?"]),
        (("train",), ["no configuration", "quickstart"]),
        (("train", "quikstart"), ["quikstart", "did you mean quickstart?"]),
        (("train", "missing.toml"), ["missing.toml"]),
        (("train", "quickstart", "--model.hiden-size", "64"), ["did you mean --model.hidden-size?"]),
        (("train", "quickstart", "--report-to", "trackio"), ["--trackers.tensorboard or --trackers.trackio?"]),
        (("train", "quickstart", "--train.steps", "many"), ["--train.steps", "many"]),
        (("train", "quickstart", "--train.steps"), ["--train.steps"]),
        (("train", "quickstart", "--model.scoring-func", "relu"), ["--model.scoring-func", "relu", "sigmoid"]),
        (("train", "quickstart", "--dry-rn"), ["--dry-rn", "did you mean --dry-run?"]),
        (("train", "quickstart", "surplus"), ["surplus"]),
        (("train", "quickstart", "--model.num-key-value-heads", "3"), ["num_key_value_heads = 3"]),
        (("train", "quickstart", "--model.num-experts-per-tok", "9"), ["num_experts_per_tok = 9"]),
        (("train", "quickstart", "--model.n-group", "3"), ["n_group = 3", "n_routed_experts"]),
        (("train", "quickstart", "--data.source", "files"), ["data.files"]),
        (("train", "quickstart", "--data.source", "files", "--data.files", "none/*.txt"), ["none/*.txt"]),
        (("train", "quickstart", "--data.files", ""), ["data.files: '' names nothing"]),
        (("train", "quickstart", "--name", "a/b"), ["a/b", "name"]),
        (("train", "quickstart", "--train.init-from", ""), ["train.init_from is empty"]),
        (("train", "quickstart", "--runs-dir", ""), ["runs_dir is empty"]),
        (("import", ""), ["DIR is empty"]),
        (("import", ".", "--runs-dir", ""), ["--runs-dir is empty"]),
        (("export", "", "target"), ["CHECKPOINT is empty"]),
        (("export", "runs/none", ""), ["DIR|FILE.gguf is empty"]),
        (("generate", "", "--prompt", "x"), ["CHECKPOINT is empty"]),
        (("evaluate", ""), ["CHECKPOINT is empty"]),
        (("evaluate", "runs/none", "--json", ""), ["--json is empty"]),
        (("evaluate", "runs/none", "--tasks", "cloze_python", "--tasks-path", ""), ["--tasks-path is empty"]),
        (("bench", "train", "--shape", "quickstart", "--json", ""), ["--json is empty"]),
        (("generate", "runs/none", "--prompt", "x"), ["runs/none"]),
        (("evaluate", "runs/none"), ["runs/none"]),
    ],
)  # fmt: skip
def test_arguments(
    arguments: tuple[str, ...], expected: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, *arguments)
    assert all(part in said for part in expected), said
    assert not runs.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "runs/englihs"),
        ("train", "quickstart", "--train.init-from", "runs/englihs"),
        ("export", "runs/englihs", "out"),
        ("generate", "runs/englihs", "--prompt", "x"),
    ],
)
def test_a_run_that_is_named_nearly_so(
    arguments: tuple[str, ...], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "english").mkdir(parents=True)
    (runs / "englihs.txt").write_text("no directory")
    assert "did you mean runs/english?" in complaint(capsys, *arguments)
    assert not (runs.parent / "out").exists()


@pytest.mark.parametrize(
    "sections, expected",
    [
        ({"model": {"hiden_size": 64}}, ["tiny.toml", "model.hiden_size", "did you mean model.hidden_size?"]),
        ({"modle": {"hidden_size": 64}}, ["modle", "did you mean model?"]),
        ({"train": {"steps": "12"}}, ["train.steps = '12'", "a whole number"]),
        ({"train": {"steps": 1.5}}, ["train.steps = 1.5", "a whole number"]),
        ({"train": {"micro_batch_size": 0}}, ["train.micro_batch_size = 0", "from 1"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas", "list of 2"]),
        ({"train": {"device": "tpu"}}, ["train.device = 'tpu'", "auto, cpu, cuda"]),
        ({"tokenizer": {"vocab_size": 301}}, ["tokenizer.vocab_size = 301", "model.vocab_size = 300"]),
        ({"tokenizer": {"name": "none/tokenizer.json"}}, ["none/tokenizer.json"]),
        ({"data": {"sequence_length": 65}}, ["data.sequence_length = 65", "max_position_embeddings = 64"]),
    ],
)
def test_toml(
    sections: dict[str, dict[str, Any]], expected: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(runs.parent, **sections)
    said = complaint(capsys, "train", str(path), *QUICK)
    assert all(part in said for part in expected), said
    assert not runs.exists()


def test_a_runs_directory_that_cannot_be_made(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(runs.parent)
    (runs.parent / "file").touch()
    for place in ("/proc/p828", "file", "file/below"):  # /proc takes no directory, not even from root
        said = complaint(capsys, "train", str(path), *QUICK, "--runs-dir", place)
        assert place in said
        assert "cannot be written" in said


def test_empty_data(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.parent / "empty.txt").touch()
    path = write_toml(runs.parent, data={"files": ["empty.txt"]})
    said = complaint(capsys, "train", str(path), *QUICK)
    assert "empty.txt" in said
    assert not runs.exists()


def test_data_shorter_than_a_row(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.parent / "short.txt").write_text("a few words")
    (runs.parent / "other.txt").write_text("others, to validate on")
    validation = {"kind": "files", "files": ["other.txt"]}
    path = write_toml(runs.parent, data={"files": ["short.txt"], "validation": validation})
    said = complaint(capsys, "train", str(path), *QUICK)
    assert "data.sequence_length = 32" in said
    assert "less than one row" in said
    assert "runs/tiny/tokenizer.json, just trained, is kept" in said


def test_a_tokenizer_with_more_tokens_than_the_model(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(runs.parent)
    assert dispatch(["train", str(path), *QUICK]) == 0
    larger = runs / "tiny" / "tokenizer.json"
    smaller = write_toml(runs.parent, tokenizer={"name": str(larger)}, model={"vocab_size": 280})
    said = complaint(capsys, "train", str(smaller), *QUICK, "--name", "other")
    assert "300" in said
    assert "280" in said
    assert not (runs / "other").exists()


def test_a_checkpoint_of_another_shape(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(runs.parent)
    assert dispatch(["train", str(path), *QUICK]) == 0
    before = (runs / "tiny" / "config.toml").read_text()
    said = complaint(capsys, "train", str(path), *QUICK, "--model.hidden-size", "48")
    assert "model.hidden_size = 32, now 48" in said
    assert (runs / "tiny" / "config.toml").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_no_gpu_when_one_is_asked_for(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(runs.parent)
    if command == "train":
        said = complaint(capsys, "train", str(path), "--train.device", "cuda")
        assert not runs.exists()
    else:
        assert dispatch(["train", str(path), *QUICK]) == 0
        prompt = ["--prompt", "a"] if command == "generate" else []
        said = complaint(capsys, command, str(runs / "tiny"), "--device", "cuda", *prompt)
    assert "no GPU" in said


def test_a_full_disk_while_saving(tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: the write fails the same way, half-way through a file."""
    resource = pytest.importorskip("resource")
    path = write_toml(tmp_path, train={"steps": 8}, checkpoint={"every": 4}, evaluation={"every": 0})
    code, _, _ = in_process("train", str(path), "--train.steps", "4", cwd=tmp_path)
    assert code == 0
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    size = (checkpoints / "step_00000004" / "optimizer.safetensors").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, _, said = p828("train", str(path), cwd=tmp_path, preexec_fn=limit)
    assert code == 1, said
    assert "step_00000008" in said
    assert len(said.strip().splitlines()) <= 2
    assert [entry.name for entry in checkpoints.iterdir()] == ["step_00000004"]
    code, _, said = in_process("train", str(path), cwd=tmp_path)
    assert code == 0, said
    assert (checkpoints / "step_00000008").exists()
