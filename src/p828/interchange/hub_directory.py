"""The small files of a directory in the hub's layout: which model it is, and with which tokenizer. No torch.

They may be from anywhere: each is bounded, and every value is checked.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from p828.config import Config, ModelConfig, TokenizerConfig, from_dict, validate
from p828.config.files import HUB_FILE, read_toml
from p828.config.values import changed, flatten, shown
from p828.errors import ConfigError, did_you_mean, reason
from p828.files import MEBIBYTE, read_limited
from p828.interchange.architectures import glm4_moe, llama, mimo_v2_flash, mixtral, own, qwen3_moe
from p828.interchange.architectures.architecture import Piece

CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_SETTINGS = HUB_FILE, "tokenizer.json", "tokenizer_config.json"
RUN_CONFIG_FILE = "config.toml"
"""In an export of p828: the configuration of its run."""
STEP = "p828_step"
"""Key of an export's config.json: the optimizer updates that made it."""
LARGEST_JSON = 256 * MEBIBYTE
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
TAKEN = ("model.mask_documents", "model.dropout", "data.sequence_length", "data.text_field", "tokenizer.vocab_size")
"""What is taken from the config.toml of an export, of which config.json says nothing: no code, path or address."""


class Readable(NamedTuple):
    """An architecture that p828 reads."""

    from_config: Callable[[Mapping[str, Any]], ModelConfig]
    pieces: Callable[[str, ModelConfig], list[Piece]]


READABLE = {
    "p828": Readable(own.from_config, own.pieces),
    "glm4_moe": Readable(glm4_moe.from_config, glm4_moe.pieces),
    "mimo_v2_flash": Readable(mimo_v2_flash.from_config, mimo_v2_flash.pieces),
    "mixtral": Readable(mixtral.from_config, mixtral.pieces),
    "qwen3_moe": Readable(qwen3_moe.from_config, qwen3_moe.pieces),
    "llama": Readable(llama.from_config, llama.pieces),
    "qwen3": Readable(llama.from_config_of_qwen3, llama.pieces),
}
REFUSED = {"olmoe": "its norms on q and k are over all heads together, p828's over each head"}


@dataclass(frozen=True)
class HubDirectory:
    """What the small files of a directory say. `read_hub_directory` makes it."""

    path: Path
    config: Config
    """The defaults with this model, this tokenizer by its file's path, and `TAKEN` of an export of p828."""
    pieces: Callable[[str, ModelConfig], list[Piece]]
    """As `architecture.Architecture` says."""
    step: int
    """Optimizer updates that made an export of p828; 0 for any other model."""


def is_hub_directory(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def read_hub_directory(path: Path) -> HubDirectory:
    """Raises ConfigError naming the file, and the field of theirs that p828 does not have."""
    if not path.is_dir():
        raise ConfigError(
            f"{path}: {'is a file' if path.exists() else 'no such directory'}; give the directory of a model"
        )
    values = _read_json(path / CONFIG_FILE)
    readable = _readable(path / CONFIG_FILE, values)
    try:
        model, step = readable.from_config(values), _step(values)
    except ConfigError as error:
        raise ConfigError(f"{path / CONFIG_FILE}: {error}") from None
    config = _run_config(path, model)
    config = replace(config, tokenizer=_tokenizer(path, values, config.tokenizer))
    validate(replace(config, name="import"))
    return HubDirectory(path, config, readable.pieces, step)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_limited(path, LARGEST_JSON))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: no {path.name} is there; give the directory of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(reason(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no table of a model's settings")
    return values


def _readable(path: Path, values: Mapping[str, Any]) -> Readable:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in READABLE:
        why = REFUSED.get(kind, "") if isinstance(kind, str) else ""
        near = "" if why or not isinstance(kind, str) else did_you_mean(kind[:80], READABLE)
        raise ConfigError(
            f"{path}: model_type = {shown(kind)}{f': {why}.' if why else near or '.'} Accepted: {', '.join(READABLE)}"
        )
    return READABLE[kind]


def _step(values: Mapping[str, Any]) -> int:
    step = values.get(STEP, 0)
    if type(step) is not int or not 0 <= step < 2**31:
        raise ConfigError(f"{STEP} = {shown(step)}: a whole number of at least 0 is accepted")
    return step


def _run_config(path: Path, model: ModelConfig) -> Config:
    """The defaults with this model, with `TAKEN` of an export's run, and with no more context than the model has.

    The file may be anyone's. All else in it would have a later run read, fetch, send or execute what its author likes.
    Raises ConfigError naming the file.
    """
    config, file = Config(model=model), path / RUN_CONFIG_FILE
    if file.exists():
        try:
            theirs = flatten(from_dict(read_toml(file), str(file)))
        except RecursionError:
            raise ConfigError(f"{file}: cannot be read: nested too deeply") from None
        config = changed(config, {key: theirs[key] for key in TAKEN})
    length = min(config.data.sequence_length, model.max_position_embeddings)
    return changed(config, {"data.sequence_length": length})


def _tokenizer(path: Path, values: Mapping[str, Any], settings: TokenizerConfig) -> TokenizerConfig:
    """The settings that name the directory's tokenizer.json and its end token."""
    file = path / TOKENIZER_FILE
    if not file.exists():
        others = [name for name in OTHER_TOKENIZERS if (path / name).is_file()]
        found = f"; {others[0]} is of another kind" if others else ""
        raise ConfigError(f"{path}: no {TOKENIZER_FILE} is there{found}. p828 reads tokenizers of that form only")
    return replace(settings, name=str(file), eos_token=_end_token(path, values))


def _end_token(path: Path, values: Mapping[str, Any]) -> str:
    """The text of the token that ends a document: as the tokenizer's settings name it, else the model's."""
    if (path / TOKENIZER_SETTINGS).exists():
        token = _read_json(path / TOKENIZER_SETTINGS).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    number = values.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    spec = _read_json(path / TOKENIZER_FILE)
    for token in spec.get("added_tokens") or ():
        if isinstance(token, dict) and token.get("id") == number and isinstance(token.get("content"), str):
            return str(token["content"])
    raise ConfigError(
        f"{path}: no token is named that ends a document: eos_token in {TOKENIZER_SETTINGS}, or eos_token_id in "
        f"{CONFIG_FILE} for a token in added_tokens of {TOKENIZER_FILE}"
    )
