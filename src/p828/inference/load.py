"""A trained model from disk, ready to use."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from p828.config import Config, ModelConfig, from_dict, validate
from p828.data.tokenizer import Tokenizer
from p828.errors import UserError
from p828.kernels.adamw import split_float32
from p828.model.precision import matrices
from p828.model.transformer import Transformer
from p828.train import checkpoint
from p828.train.device import pick_device, pick_dtype
from p828.train.engine import check_widths


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


def load_model(path: str | Path, device: str = "auto") -> LoadedModel:
    """Load from a run's directory (its newest complete checkpoint) or a checkpoint; `device`: auto, cpu or cuda.

    Raises UserError when there is no checkpoint, it is damaged or does not fit its configuration, the tokenizer is
    missing or does not fit the model, or there is no GPU although one is asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda": this machine shows no GPU to PyTorch; "auto" or "cpu" is accepted')
    place = pick_device(device)
    found = checkpoint.resolve(Path(path)).resolve()
    loaded = checkpoint.load(found, ["model"])
    if not isinstance(loaded.state.get("config"), Mapping):
        raise UserError(f"{found}: holds no configuration (config in {checkpoint.STATE})")
    config = from_dict(loaded.state["config"], str(found))
    validate(config)
    tokenizer = _load_tokenizer(found.parent.parent / "tokenizer.json", config)
    if loaded.state.get("tokenizer") != tokenizer.fingerprint():
        raise UserError(f"{found}: trained with another tokenizer than its run's tokenizer.json")

    sizes, dtype = _arithmetic(config, place)
    model = Transformer(sizes)
    _check_tensors(found, model.state_dict(), loaded.tensors["model"])
    model.load_state_dict(loaded.tensors["model"])
    _store_in(model, dtype)
    return LoadedModel(model.to(place).eval(), tokenizer, config, found, loaded.step, dtype)


def _arithmetic(config: Config, device: torch.device) -> tuple[ModelConfig, torch.dtype]:
    """The run's, or plain code in float32 where this GPU's kernels do not take the model: it may be from a CPU."""
    try:
        dtype = pick_dtype(config.train.dtype, device)
        check_widths(config, device, dtype)
    except UserError:
        return replace(config.model, attention_backend="reference"), torch.float32
    return config.model, dtype


def _load_tokenizer(path: Path, config: Config) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint is used from within its run's directory")
    tokenizer = Tokenizer.from_file(path, config.tokenizer.eos_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path}: its vocabulary of {tokenizer.vocab_size} exceeds model.vocab_size = {config.model.vocab_size}"
        )
    return tokenizer


def _check_tensors(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first tensor that differs."""
    for name, tensor in expected.items():
        shape = list(tensor.shape)
        if name not in found:
            raise UserError(f"{path}: the weights lack {name}, which by the configuration has the shape {shape}")
        if list(found[name].shape) != shape:
            raise UserError(
                f"{path}: {name} has the shape {list(found[name].shape)}, by the configuration it is {shape}"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{path}: the weights hold {name}, which the configured model does not have")


def _store_in(model: Transformer, dtype: torch.dtype) -> None:
    """Cast matrices once instead of at every use, and to the same numbers that training computes with."""
    if dtype == torch.bfloat16:
        for _, parameter in matrices(model):
            parameter.data, _ = split_float32(parameter.data)
