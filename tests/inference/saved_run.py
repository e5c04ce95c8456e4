"""Runs on disk around a model that was never trained as a run."""

from pathlib import Path

from taught_text import TAUGHT

from p828.config import Config, DataConfig, EvaluationConfig, TokenizerConfig, ValidationConfig
from p828.config.values import to_dict
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.model.transformer import Transformer
from p828.train import checkpoint_writer


def save_run(directory: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """A run that validates on one document of the text that `taught` knows."""
    directory.mkdir()
    (directory / "text.md").write_text(TAUGHT)
    config = Config(
        name="run",
        model=model.config,
        data=DataConfig(sequence_length=16, validation=ValidationConfig(kind="files", files=(f"{directory}/text.md",))),
        tokenizer=TokenizerConfig(name="tokenizer.json"),
        evaluation=EvaluationConfig(rows=1),
    )
    state = {"config": to_dict(config), "tokenizer": tokenizer.fingerprint()}
    checkpoint_writer.save(directory / "checkpoints", 7, {"model": model.state_dict(), "optimizer": {}}, state)
    tokenizer.save(directory / "tokenizer.json")
    return directory
