"""Models as checkpoints, and what transformers makes of their exports."""

import dataclasses
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

from p828.config import Config, DataConfig, TokenizerConfig
from p828.config.values import to_dict
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.interchange.export import export_model
from p828.model.transformer import Transformer
from p828.runs.train_state import TrainState
from p828.train import checkpoint_writer

EOS = "<|endoftext|>"
STEP = 10


def letters() -> Tokenizer:
    """A token a character: 90, fewer than the tiny model's 97 rows."""
    vocabulary = {character: i for i, character in enumerate(" " + string.printable[:88])} | {EOS: 89}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    split: Any = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.pre_tokenizer = split
    fuse: Any = decoders.Fuse()
    inner.decoder = fuse
    inner.add_special_tokens([EOS])
    return Tokenizer(inner, EOS)


def save_model(run: Path, model: Transformer, tokenizer: Tokenizer | None = None) -> Path:
    """The model as a run with one checkpoint; returns `run`."""
    tokenizer = tokenizer or letters()
    config = Config(
        name="run",
        model=model.config,
        data=DataConfig(sequence_length=32),
        tokenizer=TokenizerConfig(name="tokenizer.json", eos_token=EOS),
    )
    state = {
        "config": to_dict(config),
        "tokenizer": tokenizer.fingerprint(),
        "progress": dataclasses.asdict(TrainState(step=STEP, tokens=1234, source_tokens=[1234])),
    }
    checkpoint_writer.save(run / "checkpoints", STEP, {"model": model.state_dict(), "optimizer": {}}, state)
    tokenizer.save(run / "tokenizer.json")
    return run


def in_transformers(model: Transformer, directory: Path, **loading: Any) -> Any:
    """The model after an export, as transformers loads it, in evaluation mode."""
    exported = directory / "export"
    export_model(save_model(directory / "run", model), exported)
    return load(exported, **loading)


def load(exported: Path, **loading: Any) -> Any:
    """As `AutoModelForCausalLM` loads it; no tensor may be missing or left over."""
    from transformers import AutoModelForCausalLM

    loaded, found = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True, **loading)
    assert not any(found.values()), found
    return loaded


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors' numbers, relative to the largest magnitude of the second one's."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@torch.no_grad()
def logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """(B, S, V)"""
    return model.logits(model(tokens_BS).hidden_BSH)
