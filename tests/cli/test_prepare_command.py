import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tomli_w

from p828.cli.main import dispatch
from p828.config import TokenizerConfig, load
from p828.data.text.documents import is_held_out
from p828.data.tokenizer.training import train_tokenizer
from p828.runs import records
from runs import write_text, write_toml
from tokenizer_kinds import EOS, KINDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_toml(tmp_path, train={"steps": 2}))


def test_prepared_once_and_trained_on(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^prepared: [\d,]+ tokens to train on in \d+ documents, [\d,]+ to validate on in \d+$", said, re.M
    )
    assert re.search(r"packing concatenate, cut \d+\.\d% of the documents$", said, re.M)
    assert "match their checksums" not in said
    assert dispatch(["prepare", toml, *flags]) == 0
    num_files = len([*Path("prepared").glob("*.tokens"), *Path("prepared").glob("*.documents")])
    assert f"complete already; all {num_files} files match their checksums" in capsys.readouterr().out
    assert dispatch(["train", toml, *flags, "--evaluation.bigram-baseline", "True"]) == 0
    assert "a bigram model of the same tokens" in capsys.readouterr().out
    assert Path("runs/tiny/tokenizer.json").read_bytes() == Path("prepared/tokenizer.json").read_bytes()


def test_a_preset_takes_its_tokenizer_from_prepared_data(toml: str) -> None:
    assert dispatch(["prepare", toml, "--data.prepared", "prepared"]) == 0
    sizes = ["--model.hidden-size", "32", "--model.moe-intermediate-size", "32", "--model.num-hidden-layers", "1"]
    sizes += ["--data.sequence-length", "32", "--train.micro-batch-size", "2", "--train.steps", "2"]
    sizes += ["--schedule.warmup-steps", "1"]
    assert dispatch(["train", "quickstart", "--data.prepared", "prepared", *sizes]) == 0
    assert load("runs/quickstart").tokenizer.vocab_size == 300
    assert Path("runs/quickstart/tokenizer.json").read_bytes() == Path("prepared/tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tokenizer.vocab-size", "290"], "prepared with tokenizer.vocab_size = 300, not 290"),
        (["--data.validation.fraction", "0.3"], "made with data.validation = "),
        (["--data.packing", "best_fit"], "made with data.packing = 'concatenate', not 'best_fit'"),
        (["--tokenizer.name", "other/tokenizer.json"], "prepared with another tokenizer"),
    ],
)
def test_training_on_other_tokens_is_refused(
    toml: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["prepare", toml, "--data.prepared", "prepared"]) == 0
    assert dispatch(["prepare", toml, "--data.prepared", "other", "--tokenizer.vocab-size", "280"]) == 0
    capsys.readouterr()
    assert dispatch(["train", toml, "--data.prepared", "prepared", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def test_best_fit_serves_one_length(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared", "--data.packing", "best_fit"]
    assert dispatch(["prepare", toml, *flags]) == 0
    assert dispatch(["train", toml, *flags, "--data.sequence-length", "16"]) == 2
    assert "made with data.sequence_length = 32, not 16" in capsys.readouterr().err


def test_a_damaged_shard_ends_a_run_before_it_begins(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags]) == 0
    shard = Path("prepared/training-00000.tokens")
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    for command in ("prepare", "train"):
        capsys.readouterr()
        assert dispatch([command, toml, *flags]) == 2
        assert "prepared/training-00000.tokens: damaged or changed" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_mixtures_sources_share_one_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"source": "files", "files": [str(tmp_path / "text" / "*.txt")]}
    mixture = [{"name": name, "prepared": name, **files} for name in ("one", "two")]
    toml = str(write_toml(tmp_path, data={"mixture": mixture}, train={"steps": 2}))
    assert dispatch(["prepare", toml]) == 0
    assert Path("one/tokenizer.json").read_bytes() == Path("two/tokenizer.json").read_bytes()
    assert dispatch(["train", toml]) == 0
    said = capsys.readouterr().out
    assert "tokens so far: one 128 (50.0%), two 128 (50.0%)" in said


def test_prepared_data_says_what_it_was_made_from(
    toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No flag but the directory is needed to train on it, though the configuration names other text."""
    flags = ["--data.files", "text", "--data.validation.fraction", "0.3", "--data.packing", "best_fit"]
    assert dispatch(["prepare", toml, "--data.prepared", "prepared", *flags]) == 0
    values = tomllib.loads(Path(toml).read_text())
    del values["data"]["source"], values["data"]["files"], values["data"]["validation"]
    (tmp_path / "other.toml").write_text(tomli_w.dumps({**values, "name": "other"}))
    (tmp_path / "text").rename(tmp_path / "moved")  # which training does not read
    assert dispatch(["train", "other.toml", "--data.prepared", "prepared"]) == 0, capsys.readouterr().err
    assert dispatch(["train", "runs/other", "--train.steps", "3"]) == 0, capsys.readouterr().err
    run = tomllib.loads(Path("runs/other/config.toml").read_text())["data"]
    assert (run["source"], run["files"], run["packing"]) == ("files", ["text"], "best_fit")
    assert run["validation"]["fraction"] == 0.3


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data.files", "text/*.txt"], ""),
        (["--data.files", "./text/../text/*.txt"], ""),
        (["--data.files", "elsewhere/*.txt"], ""),
        (["--data.files", "text/00*.txt"], "made with data.files = "),
        (["--data.files", "edited"], "made with data.files = "),
        (["--data.source", "python"], "made with data.source = 'files', not 'python'"),
        (["--data.hub-name", "some/text"], "made with data.source = 'files', not 'hf'"),
    ],
)
def test_given_text_has_to_be_what_was_prepared(
    toml: str, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tomllib.loads(Path(toml).read_text())
    del values["data"]["source"], values["data"]["files"], values["data"]["validation"]
    Path(toml).write_text(tomli_w.dumps(values))
    assert dispatch(["prepare", toml, "--data.files", "text/*.txt", "--data.prepared", "prepared"]) == 0
    for copy in ("elsewhere", "edited"):
        shutil.copytree("text", copy, copy_function=shutil.copyfile)
    edited = Path("edited/007.txt")
    edited.write_text(edited.read_text().swapcase())
    capsys.readouterr()
    assert dispatch(["train", toml, "--data.prepared", "prepared", *flags]) == (2 if said else 0)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "data.prepared is empty"),
        (["--data.preparedd", "x"], "did you mean --data.prepared?"),
        (["--data.prepared", "tiny.toml"], "tiny.toml"),
        (["--data.prepared", "x", "--prepare.min-characters", "100000"], "nothing is left for training"),
        (["--data.prepared", "x", "--data.files", "none/*"], "'none/*' matches no file"),
    ],
)
def test_wrong_input_is_answered_in_a_line(
    toml: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["prepare", toml, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) <= 2


def test_a_command_that_came_to_nothing_leaves_nothing(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags, "--prepare.min-characters", "100000"]) == 2
    assert not Path("prepared").exists()
    Path("prepared").mkdir()
    Path("prepared/tokenizer.json").write_text("left by another program")
    assert dispatch(["prepare", toml, *flags]) == 0, capsys.readouterr().err


def test_text_of_blank_lines_alone_is_wrong_input(
    toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blank.txt").write_text("\n" * 1000)
    assert dispatch(["prepare", toml, "--data.files", str(tmp_path / "blank.txt"), "--data.prepared", "blank"]) == 2
    assert "nothing but blank lines and spaces" in capsys.readouterr().err
    assert not Path("blank").exists()


def test_a_directory_of_other_files_is_left_alone(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("home").mkdir()
    Path("home/thesis.tex").write_text("ten years")
    assert dispatch(["prepare", toml, "--data.prepared", "home"]) == 2
    assert "home: holds other files" in capsys.readouterr().err
    assert [path.name for path in Path("home").iterdir()] == ["thesis.tex"]


def test_a_cut_shard_is_named_before_training(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags]) == 0
    shard = Path("prepared/training-00000.documents")
    shard.write_bytes(shard.read_bytes()[:-3])
    assert dispatch(["train", toml, *flags]) == 2
    assert "prepared/training-00000.documents" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_on_prepared_data_does_not_go_on_without_it(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags]) == 0
    assert dispatch(["train", toml, *flags]) == 0
    assert dispatch(["train", toml, "--train.steps", "4"]) == 2
    assert "data.prepared is empty: the run was trained on prepared data" in capsys.readouterr().err


def test_a_run_on_prepared_data_is_evaluated_on_other_files(
    toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.prepared", "prepared"]
    assert dispatch(["prepare", toml, *flags]) == 0
    assert dispatch(["train", toml, *flags]) == 0
    other = tmp_path / "other.txt"
    other.write_text("abcdef " * 9)
    said = []
    for arguments in ([], ["--data.validation.files", str(other)]):
        capsys.readouterr()
        assert dispatch(["evaluate", "runs/tiny", *arguments]) == 0
        said.append(int(re.findall(r"(\d+) bytes", capsys.readouterr().out)[0]))
    assert said[1] < 63 < said[0]  # its first token is not predicted


def test_a_step_without_targets_changes_nothing(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch whose last row has one token, alone in its step."""
    Path("one").mkdir()
    Path("one/a.txt").write_text("x")
    Path("one/b.txt").write_text("x" * 30)  # with the end of each 33 tokens: a row of 32 and one more
    data = ["--data.files", "one/*.txt", "--data.prepared", "prepared", "--tokenizer.name", "tok.json"]
    validation = ["--data.validation.kind", "files", "--data.validation.files", "text/000.txt"]
    train_tokenizer(TokenizerConfig(vocab_size=257), ["x"]).save(Path("tok.json"))
    sizes = ["--train.micro-batch-size", "1", "--train.gradient-accumulation", "1", "--data.sequence-length", "31"]
    arguments = [toml, *data, *validation, *sizes]
    assert dispatch(["prepare", *arguments]) == 0
    assert dispatch(["train", *arguments]) == 0, capsys.readouterr().err
    steps = [line for line in records.read(Path("runs/tiny/metrics.jsonl")) if line["kind"] == "step"]
    assert sorted(step["loss"] == 0 for step in steps) == [False, True]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece"])
def test_bits_per_byte_of_prepared_data_are_right_or_not_given(
    toml: str, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Where the tokens do not say how many bytes the text had, as after a normalizer that drops spaces."""
    Path("tok.json").write_text(KINDS[kind]().to_str())
    text = ["The cat and  the dog\n" * 20, "a mat\n" * 40]
    for name in ("text", "held"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in text * 8))
    flags = [
        "--data.files", "text.jsonl", "--data.validation.files", "held.jsonl", "--data.sequence-length", "32",
        "--tokenizer.name", "tok.json", "--tokenizer.eos-token", EOS, "--model.vocab-size", "0",
    ]  # fmt: skip
    assert dispatch(["prepare", toml, *flags, "--data.prepared", "prepared"]) == 0
    quick = ["--train.steps", "1", "--evaluation.rows", "1000", "--evaluation.prompts"]
    assert dispatch(["train", toml, *flags, "--data.prepared", "prepared", *quick]) == 0
    capsys.readouterr()
    assert dispatch(["evaluate", "runs/tiny"]) == 0
    of_tokens = capsys.readouterr().out.splitlines()
    assert dispatch(["evaluate", "runs/tiny", "--data.files", "held.jsonl"]) == 0
    of_text = capsys.readouterr().out.splitlines()
    assert of_tokens[1] == of_text[1]  # the loss of all rows
    if kind == "word_piece":
        assert "not known: the tokens of the prepared data are decoded to other text" in of_tokens[3]
        assert "bytes" not in of_tokens[4]
    else:
        assert of_tokens[3:5] == of_text[3:5]


def test_a_mixture_is_evaluated_on_all_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "other", documents=40, seed=1)
    files = {"one": "text", "two": "other"}
    mixture = [
        {"name": name, "prepared": name, "source": "files", "files": [str(tmp_path / folder / "*.txt")]}
        for name, folder in files.items()
    ]
    toml = str(write_toml(tmp_path, data={"mixture": mixture}, train={"steps": 2}))
    assert dispatch(["prepare", toml]) == 0
    assert dispatch(["train", toml]) == 0
    said = []
    for share in ("0.2", "0.3"):  # the run's own, prepared; another, read from both sources' text
        capsys.readouterr()
        assert dispatch(["evaluate", "runs/tiny", "--rows", "10000", "--data.validation.fraction", share]) == 0
        said.append(int(re.findall(r"([\d,]+) bytes", capsys.readouterr().out)[0].replace(",", "")))
    held_out = [
        [text for path in (tmp_path / folder).iterdir() if is_held_out(text := path.read_text(), 0.3)]
        for folder in files.values()
    ]
    assert all(held_out)
    # the first token of each source's first row and of every row after it is not predicted
    assert 0.9 * sum(len(text) for texts in held_out for text in texts) < said[1]
    assert said[0] < said[1]
