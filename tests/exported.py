"""Models as checkpoints, and what transformers makes of their exports."""

import dataclasses
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

from p828.config import Config, DataConfig, TokenizerConfig
from p828.config.values import to_dict
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import save_template
from p828.interchange.export import export_model
from p828.model.transformer import Transformer
from p828.runs.train_state import TrainState
from p828.train import checkpoint_writer

EOS = "<|endoftext|>"
STEP = 10
DATA = DataConfig(sequence_length=32)


def letters(*special_tokens: str) -> Tokenizer:
    """A token a character: 90 and the special ones, fewer than the tiny model's 97 rows."""
    vocabulary = {character: i for i, character in enumerate(" " + string.printable[:88])} | {EOS: 89}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    split: Any = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.pre_tokenizer = split
    fuse: Any = decoders.Fuse()
    inner.decoder = fuse
    inner.add_special_tokens([EOS, *special_tokens])
    return Tokenizer(inner, EOS)


def save_model(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    eos_token: str = EOS,
    data: DataConfig = DATA,
) -> Path:
    """The model as a run with one checkpoint; returns `run`."""
    tokenizer = tokenizer or letters()
    config = Config(
        name="run",
        model=model.config,
        data=data,
        tokenizer=TokenizerConfig(name="tokenizer.json", eos_token=eos_token),
    )
    state = {
        "config": to_dict(config),
        "tokenizer": tokenizer.fingerprint(),
        "progress": dataclasses.asdict(TrainState(step=STEP, tokens=1234, source_tokens=[1234])),
    }
    checkpoint_writer.save(run / "checkpoints", STEP, {"model": model.state_dict(), "optimizer": {}}, state)
    tokenizer.save(run / "tokenizer.json")
    if tokenizer.template is not None:
        save_template(run, tokenizer.template)
    return run


def in_transformers(model: Transformer, directory: Path, **loading: Any) -> Any:
    """The model after an export, as transformers loads it, in evaluation mode."""
    exported = directory / "export"
    export_model(save_model(directory / "run", model), exported)
    return load(exported, **loading)


def load(exported: Path, **loading: Any) -> Any:
    """As `AutoModelForCausalLM` loads it; no tensor may be missing or left over. Code of its own is trusted."""
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "output_loading_info": True, **loading}
    loaded, found = AutoModelForCausalLM.from_pretrained(exported, **options)
    assert not any(found.values()), found
    return loaded


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors' numbers, relative to the largest magnitude of the second one's."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


class Comparison(NamedTuple):
    difference: float
    """The largest difference of the logits of all tokens before a tie, relative to the largest logit."""
    ties: int
    """Rows in which a token is sent to other experts."""


@torch.no_grad()
def compare(model: Transformer, theirs: Any, tokens_BS: Tensor, **inputs: Tensor) -> Comparison:
    """Their logits of the last tokens of their input against ours of `tokens_BS`.

    Where two experts' scores are equal but for roundings, each side may choose another one, and all that follows is
    different. So a row is compared up to its first token of which the choices are not the same. `inputs` are theirs,
    if they are not the tokens alone.
    """
    length = tokens_BS.shape[1]
    with choices_of(model.model.layers) as ours, choices_of(theirs.model.layers) as others:
        expected = logits(model, tokens_BS)
        found = theirs(**(inputs or {"input_ids": tokens_BS})).logits[:, -length:]
    differs_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    for own, other in zip(ours, others, strict=True):
        other_BSK = other.view(len(tokens_BS), -1, own.shape[-1])[:, -length:]
        differs_BS |= (own.view_as(other_BSK).sort().values != other_BSK.sort().values).any(-1)
    before_tie_BS = differs_BS.int().cumsum(1) == 0
    return Comparison(difference(found[before_tie_BS], expected[before_tie_BS]), int(differs_BS.any(1).sum()))


@contextmanager
def choices_of(layers: Any) -> Iterator[list[Tensor]]:
    """The experts that each layer's router chooses in the block: (T, K) a layer, whichever side's model it is."""
    found: list[Tensor] = []

    def note(router: Any, inputs: Any, outputs: Any) -> None:
        found.extend(tensor for tensor in outputs if tensor.dtype == torch.int64)

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """(B, S, V)"""
    return model.logits(model(tokens_BS).hidden_BSH)
