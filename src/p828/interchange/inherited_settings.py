"""What a new run takes over from the model that it starts from (`train.init_from`), besides the weights: its settings.

Reads no weights. `origin` does, once the run begins.
"""

import os
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

from p828.config import RUN_FILE, Config, ModelConfig, RopeScaling, TokenizerConfig, load
from p828.config.values import shown
from p828.errors import ConfigError
from p828.interchange.fit import OF_EXPERTS, check_shapes
from p828.interchange.origin import settings_of

TOKENIZER_FILE = "tokenizer.json"  # of a run, of a checkpoint and in the hub's layout
OF_A_TOKENIZER = ("name", "vocab_size", "eos_token")


def with_origin(config: Config, given: Collection[str], reads_prepared: bool) -> Config:
    """The configuration with the settings of the model that it starts from, but for the keys that the user has given.

    `given` are dotted keys. A configuration that was written by p828, as a run's own, has these settings already. A run
    that has a checkpoint takes its own: the model that it began from may be gone. Prepared data that is read says by
    itself with which tokenizer it was made; that is compared later. Raises ConfigError and DataError.
    """
    if "train.init_from" not in given:
        return config
    path = os.path.normpath(config.train.init_from)
    config = replace(config, train=replace(config.train, init_from=path))
    takes_tokenizer = not (reads_prepared and any(data.prepared for data in config.data.sources))
    own = _own(config)
    if own is not None:
        return _with_settings(config, own, given, takes_tokenizer)
    origin = settings_of(Path(path))
    if takes_tokenizer:
        _check_tokenizer(config, origin.tokenizer, given)
    config = _with_settings(config, origin, given, takes_tokenizer, OF_EXPERTS if config.train.upcycle else ())
    check_shapes(config, origin.model)
    file = Path(path) / TOKENIZER_FILE
    if not reads_prepared and config.tokenizer == origin.tokenizer and file.is_file():  # `p828 prepare` reads it
        config = replace(config, tokenizer=replace(config.tokenizer, name=str(file)))
    return config


def _own(config: Config) -> Config | None:
    """The configuration of the run itself, if it has begun from the same model and has a checkpoint."""
    path = config.run_dir / RUN_FILE
    if not path.is_file() or not any((config.run_dir / "checkpoints").glob("step_*")):
        return None
    own = load(str(path))
    return own if own.train.init_from == config.train.init_from else None


def _with_settings(
    config: Config, origin: Config, given: Collection[str], takes_tokenizer: bool, kept: Collection[str] = ()
) -> Config:
    """With the model of `origin`, but for what is given and for the fields in `kept`, and with its tokenizer."""
    own = set(kept) | {key.removeprefix("model.") for key in given if key.startswith("model.")}
    if not config.model.vocab_size:
        own.discard("vocab_size")
    taken = {f.name: getattr(origin.model, f.name) for f in fields(ModelConfig) if f.name not in own}
    taken["rope_scaling"] = _scaling(config.model.rope_scaling, origin.model, given)
    tokenizer = config.tokenizer
    if takes_tokenizer:
        of_origin = {
            name: getattr(origin.tokenizer, name) for name in OF_A_TOKENIZER if f"tokenizer.{name}" not in given
        }
        tokenizer = replace(tokenizer, **of_origin)
    return replace(config, model=replace(config.model, **taken), tokenizer=tokenizer)


def _scaling(scaling: RopeScaling, origin: ModelConfig, given: Collection[str]) -> RopeScaling:
    """Of a factor that is given, the original context is the one that `origin` was trained for."""
    prefix = "model.rope_scaling."
    own = {key.removeprefix(prefix): None for key in given if key.startswith(prefix)}
    values = {name: getattr(scaling, name) for name in own}
    if "factor" in own and "original_max_position_embeddings" not in own and origin.rope_scaling.factor == 1:
        values["original_max_position_embeddings"] = origin.max_position_embeddings
    return replace(origin.rope_scaling, **values)


def _check_tokenizer(config: Config, origin: TokenizerConfig, given: Collection[str]) -> None:
    """Raises ConfigError for a tokenizer that would be trained, or another end token. Files are compared later."""
    for name in OF_A_TOKENIZER:
        own, there = getattr(config.tokenizer, name), getattr(origin, name)
        is_file = config.tokenizer.name != "train" and name != "eos_token"
        if f"tokenizer.{name}" in given and own != there and not is_file:
            raise ConfigError(
                f"tokenizer.{name} = {shown(own)}: the tokenizer of train.init_from = {config.train.init_from} comes "
                f"along with its weights, there it is {shown(there)}: leave it out"
            )
