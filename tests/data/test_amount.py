"""How much data there is, against the tokens counted one by one."""

import dataclasses
from pathlib import Path

import pytest
from data_samples import text, write_jsonl

from p828.cli.main import dispatch
from p828.config import Config, DataConfig, MixedSource, TrainConfig, ValidationConfig
from p828.data.amount import Amount, amounts, describe, repeated
from p828.data.fractions import planned_fractions
from p828.data.order import SampleOrder
from p828.data.text.open import open_training
from p828.data.tokenizer.tokenizer import Tokenizer
from runs import run_config, write_toml


def config_of(files: str, **changes: object) -> Config:
    validation = ValidationConfig(kind="held_out", fraction=0.1)
    data = DataConfig(source="files", files=(files,), sequence_length=32, validation=validation)
    return Config(data=dataclasses.replace(data, **changes), train=TrainConfig(steps=10))


@pytest.mark.parametrize("ending, error", [(".jsonl", 0.1), (".jsonl.gz", 0.3), (".jsonl.zst", 0.6)])
def test_text_is_estimated_from_its_first_documents(
    tmp_path: Path, tokenizer: Tokenizer, ending: str, error: float
) -> None:
    """A reader's buffer is read ahead of the documents: compressed, it holds a good part of files as small as these."""
    for number in range(4):
        write_jsonl(tmp_path / f"{number}{ending}", [text(1000 * number + i, words=1500) for i in range(500)])
    config = config_of(str(tmp_path / f"*{ending}"))
    counted = sum(len(tokenizer.encode(words)) + 1 for words in open_training(config.data, seed=0, epochs=1))
    (amount,) = amounts(config, tokenizer, ranks=2)
    assert not amount.is_exact
    assert amount.tokens == pytest.approx(counted, rel=error)
    assert amount.planned == 10 * config.tokens_per_step * 2


def test_few_documents_are_all_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "few.jsonl", [text(i) for i in range(20)])
    config = config_of(str(tmp_path / "few.jsonl"))
    counted = sum(len(tokenizer.encode(words)) + 1 for words in open_training(config.data, seed=0, epochs=1))
    (amount,) = amounts(config, tokenizer, ranks=1)
    assert amount.tokens == counted
    assert amount.epochs is not None
    assert repeated([amount]) == [line for line in repeated([amount]) if amount.epochs > 4]


def test_prepared_tokens_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = {"prepared": str(tmp_path / "prepared")}
    assert dispatch(["prepare", str(write_toml(tmp_path, data=prepared))]) == 0
    config = run_config(tmp_path, data=prepared)
    tokenizer = Tokenizer.from_file(tmp_path / "prepared" / "tokenizer.json", config.tokenizer.eos_token)
    counted = sum(len(tokenizer.encode(words)) + 1 for words in open_training(config.data, seed=0, epochs=1))
    (amount,) = amounts(config, tokenizer, ranks=1)
    assert (amount.tokens, amount.is_exact) == (counted, True)


def test_the_fractions_of_a_mixture_are_those_of_its_rows() -> None:
    weights = [(3.0, 0.0), (1.0, 5.0)]
    mixture = tuple(MixedSource(name=str(i), weights=weights[i]) for i in range(2))
    config = Config(data=DataConfig(mixture=mixture, mixture_steps=(0, 40)), train=TrainConfig(steps=100))
    rows = SampleOrder([Rows(), Rows()], [(0, (3.0, 1.0)), (40, (0.0, 5.0))], 4, batches_per_step=1)
    for _ in range(100):
        next(rows)
    given = [source.count for source in rows.sources]  # type: ignore[attr-defined]
    assert planned_fractions(config) == pytest.approx([count / 400 for count in given])


class Rows:
    """BatchStats what is taken."""

    count = 0

    def take(self, batch: int, count: int) -> list[object]:
        self.count += count
        return []


def test_what_is_said() -> None:
    assert describe(Amount("a", 1_234_567, True, 1e6)) == "1.23 M tokens"
    assert describe(Amount("a", 1_234_567_890, False, 1e6)) == "about 1.23 B tokens"
    assert describe(Amount("a", None, False, 1e6)) == "tokens unknown"
    assert repeated([Amount("a", 1_000_000, True, 4e6), Amount("b", None, False, 1e9)]) == []
    assert "a: the run goes 4.1 times through its 1 M tokens" in repeated([Amount("a", 1_000_000, True, 4.1e6)])[0]
