"""A checkpoint as a directory that `transformers` loads: weights, config.json, tokenizer, model card."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

from p828.config import Config, ModelConfig
from p828.config.values import to_dict
from p828.data.tokenizer.chat_template import BUILT_IN
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, RunFailed, warn
from p828.files import new_directory, write_atomic
from p828.inference.load import SavedModel, opened_model
from p828.interchange.architectures.architecture import Architecture
from p828.interchange.architectures.native import architecture_of
from p828.interchange.architectures.own import OWN, code_files
from p828.interchange.hub_directory import STEP
from p828.interchange.model_card import curve_of, model_card
from p828.interchange.weights import LARGEST_FILE, write_weights, written_tensors
from p828.runs.checkpoint_content import progress_of, seconds_of
from p828.runs.file_names import CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CARD_FILE = "README.md"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Export:
    directory: Path
    checkpoint: Path
    step: int
    architecture: Architecture
    weights: list[Path]
    """The files with them."""
    bytes: int
    """Of all weights."""


def export_model(
    checkpoint: str | Path,
    directory: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    native_only: bool = False,
    report: Callable[[str], None] = warn,
    largest_file: int = LARGEST_FILE,
) -> Export:
    """Write a model for `AutoModelForCausalLM.from_pretrained(directory)` and `AutoTokenizer.from_pretrained`.

    Args:
        checkpoint: a run's directory, for its newest complete checkpoint, or one checkpoint's.
        directory: missing or empty; it is there whole or not at all.
        native_only: refuse a model that no architecture of transformers is exactly.
        report: gets a line about what takes long.
        largest_file: bytes of a file of weights at most, but for a tensor that is larger.

    Raises ConfigError, DataError and TransientReadError as `inference.load.load_model` does; ConfigError, too, for a
    directory that has something in it or whose disk has too little room; RunFailed when it cannot be written.
    """
    directory = Path(directory)
    try:
        with new_directory(directory) as filling, opened_model(checkpoint) as saved:
            return _exported(saved, filling, directory, dtype, native_only, report, largest_file)
    except OSError as error:
        raise RunFailed(f"{directory}: cannot be written: {error.strerror or error}") from None


def _exported(
    saved: SavedModel,
    filling: Path,
    directory: Path,
    dtype: Literal["float32", "bfloat16"],
    native_only: bool,
    report: Callable[[str], None],
    largest_file: int,
) -> Export:
    config, path = saved.config, saved.checkpoint.path
    architecture = architecture_of(config.model, native_only)
    tensors = saved.checkpoint.tensors
    written = written_tensors(architecture.pieces, config.model, tensors, DTYPES[dtype])
    needed = sum(tensor.bytes for tensor in written)
    check_room(filling, directory, needed)
    files = write_weights(filling, written, tensors, report, largest_file)
    end_ids = saved.tokenizer.end_ids
    hub_values = hub_config(architecture, config.model, end_ids, dtype)
    _write_json(filling / "config.json", {**hub_values, STEP: saved.checkpoint.step})
    # without a token for padding, `generate` takes the end token and warns each time
    _write_json(filling / "generation_config.json", {**_end(end_ids), "pad_token_id": end_ids[0]})
    _write_tokenizer(filling, saved.tokenizer, config.tokenizer.eos_token, config.model.max_position_embeddings)
    card = model_card(
        config,
        progress_of(saved.checkpoint),
        seconds_of(saved.checkpoint),
        saved.checkpoint.state.get("versions"),
        curve_of(path.parent.parent, saved.checkpoint.step, report),
        architecture,
        dtype,
        answers=saved.tokenizer.template is not None and config.data.has_conversations,
    )
    for file in code_files() if architecture is OWN else ():
        shutil.copyfile(file, filling / file.name)
    write_atomic(filling / CARD_FILE, card)
    write_atomic(filling / CONFIG_FILE, tomli_w.dumps(shared_settings(config)))
    return Export(
        directory=directory,
        checkpoint=path,
        step=saved.checkpoint.step,
        architecture=architecture,
        weights=[directory / file.name for file in files],
        bytes=needed,
    )


def shared_settings(config: Config) -> dict[str, Any]:
    """The content of config.toml: without the place of the run and of its records on this machine.

    A tokenizer from a file is named as it lies beside config.toml; a chat template from a file is in its settings.
    """
    values = to_dict(config)
    del values["runs_dir"], values["wandb"], values["trackers"]
    name, template = config.tokenizer.name, config.tokenizer.chat_template
    is_file = Path(name).suffix == ".json" or Path(name).expanduser().exists() or not HUB_NAME.fullmatch(name)
    if name != "train" and is_file:
        values["tokenizer"]["name"] = TOKENIZER_FILE
    if template not in BUILT_IN:
        values["tokenizer"]["chat_template"] = ""
    return values


def hub_config(architecture: Architecture, config: ModelConfig, end_ids: Sequence[int], dtype: str) -> dict[str, Any]:
    """The content of config.json. No token is named as padding: transformers would freeze its row of the embedding."""
    return {
        "architectures": [architecture.class_name],
        **architecture.to_config(config),
        "dtype": dtype,
        "bos_token_id": None,
        **_end(end_ids),
        "pad_token_id": None,
    }


def _end(ids: Sequence[int]) -> dict[str, Any]:
    """Several after training on conversations: an answer may end otherwise than a document."""
    return {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer as p828 uses it, for transformers: no dropout, and no tokens put around a text."""
    text = tokenizer.to_json()
    spec = json.loads(text)
    adds_tokens = tokenizer.inner.num_special_tokens_to_add(False) > 0
    if tokenizer.dropout is None and not adds_tokens:
        return text
    spec["model"] = {**spec["model"], **({} if tokenizer.dropout is None else {"dropout": None})}
    if adds_tokens:
        spec["post_processor"] = None
    return json.dumps(spec, ensure_ascii=False, indent=2)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, eos_token: str, context: int) -> None:
    write_atomic(directory / TOKENIZER_FILE, tokenizer_json(tokenizer))
    template = tokenizer.template
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if template is None else {**template.variables, "chat_template": template.source}),
        "eos_token": eos_token,
        "pad_token": eos_token,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / TOKENIZER_CONFIG_FILE, settings)


def check_room(filling: Path, directory: Path, needed: int) -> None:
    """Raises ConfigError when the disk of `filling` has less than `needed` bytes free."""
    free = shutil.disk_usage(filling).free
    if needed > free:
        raise ConfigError(
            f"{directory}: the weights take {needed / 1e9:,.2f} GB, and its disk has {free / 1e9:,.2f} GB free"
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
