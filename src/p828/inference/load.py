"""A trained model from disk, ready to use."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from p828.config import Config, ModelConfig, validate
from p828.data.retry import Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, warn
from p828.kernels.adamw import split_float32
from p828.model.backend import computable
from p828.model.precision import matrices
from p828.model.transformer import Transformer
from p828.runs import checkpoint
from p828.runs.checkpoint_content import check_weights, config_of, is_weights_only, rules_of
from p828.runs.file_names import TOKENIZER_FILE
from p828.system.device import pick_device, pick_dtype

READ_RETRIES = 4  # 15 seconds of waiting in all


@dataclass(frozen=True)
class LoadedModel:
    model: Transformer
    """In evaluation mode, on its device. Weights that the model casts to `dtype` at every use are stored in it."""
    tokenizer: Tokenizer
    config: Config
    """The run's resolved configuration."""
    path: Path
    """The checkpoint's directory."""
    step: int
    """Optimizer updates that made it."""
    dtype: torch.dtype
    """What to compute in."""
    rules: list[bool | None]
    """By which rule the run holds out text of each source (`data.order.held_out_rules`)."""
    has_text: bool = True
    """Whether the run has text of its own: a model that was imported has none, and its `config.data` mean nothing."""


class SavedModel(NamedTuple):
    """A checkpoint that was found to be what a run writes. Its weights are read when asked for."""

    checkpoint: checkpoint.OpenCheckpoint
    config: Config
    """The run's resolved configuration."""
    tokenizer: Tokenizer


def load_model(path: str | Path, device: str = "auto") -> LoadedModel:
    """Load from a run's directory (its newest complete checkpoint) or a checkpoint; `device`: auto, cpu or cuda.

    A line on stderr names a newer checkpoint that is damaged, and each wait for one that cannot be read for now. Raises
    ConfigError when there is no checkpoint, the tokenizer is missing or does not fit the model, or there is no GPU
    although one is asked for; DataError when it is damaged or does not fit its configuration; TransientReadError when
    it cannot be read.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": this machine shows no GPU to PyTorch; "auto" or "cpu" is accepted')
    place = pick_device(device)
    with opened_model(path) as saved:
        config, rules, has_text = saved.config, rules_of(saved.checkpoint), not is_weights_only(saved.checkpoint)
        weights = saved.checkpoint.tensors["model"]
    sizes, dtype = _arithmetic(config, place)
    model = Transformer(sizes)
    model.load_state_dict(weights)
    store_in(model, dtype)
    step = saved.checkpoint.step
    model = model.to(place).eval()
    return LoadedModel(model, saved.tokenizer, config, saved.checkpoint.path, step, dtype, rules, has_text)


@contextmanager
def opened_model(path: str | Path) -> Iterator[SavedModel]:
    """A run's newest complete checkpoint, or the one that is named, verified and open.

    Warns and raises as `load_model`. Errors of the block are raised as they are.
    """
    retry = Retry(READ_RETRIES, report=warn)
    found, notes = checkpoint.resolve_with_notes(Path(path), retry)
    for note in notes:
        warn(note)
    found = Path(os.path.abspath(found))  # as it was named, since a link to it may lie in the run's directory
    manifest = checkpoint.verify(found, ["model"], retry)
    with checkpoint.opened(found, manifest, ["model"], retry=retry) as saved:
        yield checked_model(saved)


def checked_model(saved: checkpoint.OpenCheckpoint) -> SavedModel:
    """A checkpoint whose weights are open. Raises ConfigError and DataError if it is not what a run writes."""
    config = config_of(saved)
    validate(config)
    tokenizer = _load_tokenizer(_tokenizer_file(saved), config)
    if saved.state.get("tokenizer") != tokenizer.fingerprint():
        raise ConfigError(f"{saved.path}: trained with another tokenizer than its run's {TOKENIZER_FILE}")
    check_weights(saved, config.model)
    return SavedModel(saved, config, tokenizer)


def _tokenizer_file(saved: checkpoint.OpenCheckpoint) -> Path:
    """The checkpoint's own; older ones have none, and are used from within their run's directory."""
    if TOKENIZER_FILE in saved.files:
        return saved.path / TOKENIZER_FILE
    beside, elsewhere = (path.parent.parent / TOKENIZER_FILE for path in (saved.path, saved.path.resolve()))
    return elsewhere if elsewhere.exists() and not beside.exists() else beside


def _arithmetic(config: Config, device: torch.device) -> tuple[ModelConfig, torch.dtype]:
    """The run's, or plain code in float32 where this GPU's kernels do not take the model: it may be from a CPU."""
    try:
        dtype = pick_dtype(config.train.dtype, device)
    except ConfigError:
        dtype = torch.float32
    return computable(config.model, device, dtype)


def _load_tokenizer(path: Path, config: Config) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; this checkpoint is used from within its run's directory")
    tokenizer = Tokenizer.from_file(path, config.tokenizer.eos_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{path}: its vocabulary of {tokenizer.vocab_size} exceeds model.vocab_size = {config.model.vocab_size}"
        )
    return tokenizer


def store_in(model: Transformer, dtype: torch.dtype) -> None:
    """Cast matrices once instead of at every use, and to the same numbers that training computes with."""
    if dtype == torch.bfloat16:
        for _, parameter in matrices(model):
            parameter.data, _ = split_float32(parameter.data)
