"""The model's vocabulary is the tokenizer's, unless it is given."""

import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p828.cli.main import dispatch
from p828.config import Config, ModelConfig, load, rounded_vocabulary, with_vocabulary
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.load import load_model
from p828.model.costs import count_parameters, unused_vocabulary
from p828.runs import checkpoint
from runs import tiny_values

QUICK = ("--train.steps", "2", "--evaluation.every", "0", "--schedule.warmup-steps", "0")
EOS = "<|endoftext|>"


@pytest.fixture(autouse=True)
def in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(tmp_path: Path, vocab_size: int | None = None, **tokenizer: Any) -> str:
    values = tiny_values(tmp_path)
    del values["model"]["vocab_size"]
    if vocab_size is not None:
        values["model"]["vocab_size"] = vocab_size
    values["tokenizer"] = {**values["tokenizer"], **tokenizer}
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(values))
    return str(path)


def vocabulary_of(run: str) -> int:
    """The model's, which config.toml and the checkpoint's own configuration say, too."""
    loaded = load_model(run, "cpu")
    rows = loaded.model.head_weight.shape[0]
    assert load(f"{run}/config.toml").model.vocab_size == loaded.config.model.vocab_size == rows
    newest, _ = checkpoint.find_newest(Path(run) / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest, names=()).state["config"]["model"]["vocab_size"] == rows
    return rows


def test_rounding() -> None:
    assert [rounded_vocabulary(n) for n in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    given = Config(model=ModelConfig(vocab_size=97))
    assert with_vocabulary(given, 5) == given
    assert with_vocabulary(Config()).model.vocab_size == 4096
    assert with_vocabulary(Config(), 5000).model.vocab_size == 5120
    assert with_vocabulary(load("60m")).model.vocab_size == 49152


def test_it_follows_the_trained_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert dispatch(["train", path, *QUICK]) == 0
    assert vocabulary_of("runs/tiny") == 384
    assert "never used" not in capsys.readouterr().out
    # Resumed, from the same file or from its own configuration, it keeps it.
    for again in (path, "runs/tiny/config.toml"):
        assert dispatch(["train", again, *QUICK, "--name", "tiny", "--train.steps", "3"]) == 0
        assert "vocab_size" not in capsys.readouterr().out
    assert vocabulary_of("runs/tiny") == 384
    assert dispatch(["train", path, *QUICK, "--model.vocab-size", "512"]) == 2
    assert "model.vocab_size = 384, now 512" in capsys.readouterr().err


def test_a_tokenizer_that_text_is_too_short_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, flags = write(tmp_path, 0), [*QUICK, "--tokenizer.vocab-size", "30000"]
    line = "tokenizer.vocab_size = 30,000: the tokenizer has "
    for command in (["train", path, *flags], ["prepare", path, *flags, "--data.prepared", "tokens"]):
        assert dispatch(command) == 0
        assert " ".join(capsys.readouterr().out.split()).count(line) == 1
    assert dispatch(["train", path, *flags]) == 0
    assert "the tokenizer has" not in capsys.readouterr().out  # of a run that goes on


def test_it_follows_the_tokenizer_that_there_is(tmp_path: Path) -> None:
    """However many tokens were asked for: this text does not give them."""
    path = write(tmp_path, 0)
    assert dispatch(["train", path, *QUICK, "--tokenizer.vocab-size", "30000"]) == 0
    made = Tokenizer.from_file("runs/tiny/tokenizer.json", EOS).vocab_size
    assert made < 20000
    assert vocabulary_of("runs/tiny") == rounded_vocabulary(made)
    assert dispatch(["train", path, *QUICK, "--name", "given", "--tokenizer.name", "runs/tiny/tokenizer.json"]) == 0
    assert vocabulary_of("runs/given") == rounded_vocabulary(made)


def test_a_number_that_is_given_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 600)
    assert dispatch(["train", path, *QUICK]) == 0
    assert vocabulary_of("runs/tiny") == 600
    said = " ".join(capsys.readouterr().out.split())
    model = load("runs/tiny/config.toml").model
    share = 300 * 2 * 32 / count_parameters(model).total
    assert f"model.vocab_size = 600: the tokenizer has 300 tokens, so that {share:.0%} of the parameters" in said
    # Where it is left to follow the tokenizer later, the run keeps its own.
    assert dispatch(["train", write(tmp_path), *QUICK, "--train.steps", "3"]) == 0
    assert vocabulary_of("runs/tiny") == 600


def test_a_run_that_was_not_saved_begins_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert dispatch(["train", path, *QUICK]) == 0
    before = Tokenizer.from_file("runs/tiny/tokenizer.json", EOS).fingerprint()
    for saved in Path("runs/tiny/checkpoints").iterdir():
        saved.rename(tmp_path / saved.name)
    Path("runs/tiny/metrics.jsonl").unlink()  # which tells of them
    assert dispatch(["train", path, *QUICK]) == 0
    assert vocabulary_of("runs/tiny") == 384
    assert Tokenizer.from_file("runs/tiny/tokenizer.json", EOS).fingerprint() == before


def test_unused_rows() -> None:
    sizes = ModelConfig(vocab_size=49152)
    assert unused_vocabulary(sizes, 49152) == unused_vocabulary(sizes, 45000) == ""
    share = 16384 * 2 * 512 / count_parameters(sizes).total
    assert f"{share:.0%} of the parameters" in unused_vocabulary(sizes, 32768)
    tied = ModelConfig(vocab_size=49152, tie_word_embeddings=True)
    share = 16384 * 512 / count_parameters(tied).total
    assert f"{share:.0%} of the parameters" in unused_vocabulary(tied, 32768)


def test_sizes_are_told_before_there_is_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokenizer.name", "train", "--tokenizer.vocab-size", "32768"]
    assert dispatch(["train", "60m", "--dry-run", *flags]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\[model\]\nvocab_size = 32768\n", shown)
    rows = ModelConfig(**{**vars(load("60m").model), "vocab_size": 32768})
    assert f"# {count_parameters(rows).total:,} parameters" in shown


def test_the_size_of_a_given_tokenizer_is_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tokenizer.vocab_size` is of a trained one, and may change with a preset."""
    assert dispatch(["train", write(tmp_path), *QUICK]) == 0
    given = ["--name", "given", "--tokenizer.name", "runs/tiny/tokenizer.json"]
    path = write(tmp_path)
    assert dispatch(["train", path, *QUICK, *given]) == 0
    larger = {**tiny_values(tmp_path), "tokenizer": {"name": "train", "vocab_size": 49152}}
    del larger["model"]["vocab_size"]
    (tmp_path / "larger.toml").write_text(tomli_w.dumps(larger))
    path = "larger.toml"
    assert dispatch(["train", path, *QUICK, *given, "--train.steps", "3"]) == 0
    prepared = ["--data.prepared", "prepared", "--tokenizer.name", "runs/tiny/tokenizer.json"]
    assert dispatch(["prepare", path, *prepared]) == 0
    assert dispatch(["prepare", write(tmp_path), *prepared]) == 0
    assert "vocab_size" not in capsys.readouterr().err
