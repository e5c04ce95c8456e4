"""What is said of a model of transformers that does not fit, and of files that are none; no run is made of them."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import copied, imported
from safetensors.torch import load_file, save_file

from p828.errors import ConfigError, P828Error


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


def rope(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["rope_parameters"].update(values)


WRONG_CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "leading dense layers": ("glm4_moe", change(first_k_dense_replace=1), "p828 does not have leading dense layers"),
    "mtp": ("glm4_moe", change(num_mtp_layers=1), "num_mtp_layers = 1: p828 does not have layers that predict"),
    "partial rotary": ("glm4_moe", rope(partial_rotary_factor=0.5), "p828 does not have RoPE on a part of each head"),
    "rope type": ("glm4_moe", rope(rope_type="llama3"), "rope_type = 'llama3': p828 has 'default' and 'yarn'"),
    "attention bias": ("glm4_moe", change(attention_bias=True), "attention_bias = true: p828 does not have a bias in"),
    "activation": ("glm4_moe", change(hidden_act="gelu"), "hidden_act = 'gelu': p828 does not have activations other"),
    "a size in words": ("glm4_moe", change(hidden_size="32"), "hidden_size = '32': a whole number is accepted"),
    "a size out of range": ("glm4_moe", change(vocab_size=-1), "model.vocab_size = -1: a whole number from 0"),
    "a size too large": ("glm4_moe", change(num_hidden_layers=10**6), "is of a larger model than the files hold"),
    "another size": ("glm4_moe", change(hidden_size=16), "has the shape [97, 32], by config.json it is [97, 16]"),
    "one more layer": ("glm4_moe", change(num_hidden_layers=3), "lack model.layers.2.input_layernorm.weight"),
    "one layer less": ("glm4_moe", change(num_hidden_layers=1), "hold model.layers.1.input_layernorm.weight and"),
    "a missing field": ("glm4_moe", lambda config: config.pop("hidden_size"), "hidden_size is missing"),
    "architecture": ("glm4_moe", change(model_type="glm4_mo"), "'glm4_mo'; did you mean glm4_moe? Accepted:"),
    "olmoe": ("glm4_moe", change(model_type="olmoe"), "model_type = 'olmoe': its norms on q and k are over all heads"),
    "windows": ("mixtral", change(sliding_window=32), "sliding_window = 32: p828 does not have sliding windows"),
    "dense layers between": ("qwen3_moe", change(mlp_only_layers=[0]), "[0]: p828 does not have dense layers between"),
    "mlp bias": ("llama", change(mlp_bias=True), "mlp_bias = true: p828 does not have a bias in the experts"),
    "a window": ("mimo_v2_flash", change(sliding_window=63), "sliding_window = 63: p828 has no windows; at least max_"),
    "full layers": ("mimo_v2_flash", change(layer_types=["full_attention"] * 2), "layer_types = ['full_attention', "),
    "attention factor": (
        "mimo_v2_flash",
        lambda config: config["rope_parameters"]["sliding_attention"].update(attention_factor=1.0),
        "attention_factor = 1.0: 0.1 ln(factor) + 1 is accepted, which is 1.138629",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_configuration_that_does_not_fit(case: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    model_type, edit, message = WRONG_CONFIGS[case]
    directory = copied(theirs[model_type], tmp_path / "changed")
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(P828Error, match=re.escape(message)) as caught:
        imported(directory, tmp_path / "runs")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def _without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_text(text))


def void(_: object) -> None:
    """For what a lambda is to leave out."""


def _tensors(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return change


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _index(weight_map: dict[str, Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "other.safetensors")
        _text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))(directory)

    return change


NORM = "model.norm.weight"
WRONG_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (
        _pickle,
        "pytorch_model.bin: a pickle, which may run what it likes, is not read; model.safetensors is",
    ),
    "no weights": (
        _without("model.safetensors"),
        "neither model.safetensors nor model.safetensors.index.json is there",
    ),
    "no configuration": (_without("config.json"), "no config.json is there; give the directory of a model"),
    "no table": (_text("config.json", "[]"), "config.json: is no table of a model's settings"),
    "no JSON": (_text("config.json", "{"), "config.json: cannot be read: "),
    "no safetensors": (_text("model.safetensors", "not weights"), "model.safetensors: cannot be read: "),
    "another tokenizer": (
        lambda directory: void((directory / "tokenizer.json").rename(directory / "tokenizer.model")),
        "no tokenizer.json is there; tokenizer.model is of another kind. p828 reads tokenizers of that form only",
    ),
    "a broken tokenizer": (_text("tokenizer.json", '{"model": {}}'), "tokenizer"),
    "no end token": (_text("tokenizer.json", "{}"), "no token is named that ends a document"),
    "a missing tensor": (_tensors(lambda tensors: tensors.pop(NORM)), f"the weights lack {NORM}, which by config.json"),
    "a tensor too many": (
        _tensors(lambda tensors: tensors.update(extra=torch.ones(2))),
        "the weights hold extra, which by config.json the model does not have",
    ),
    "a dtype": (_tensors(lambda tensors: tensors.update({NORM: torch.ones(32).double()})), "holds F64; F32, BF16, F16"),
    "a shape": (_tensors(lambda tensors: tensors.update({NORM: torch.ones(31)})), f"{NORM} has the shape [31], by"),
    "NaN": (_tensors(lambda tensors: tensors[NORM].fill_(torch.nan)), f"{NORM} holds numbers that are not finite"),
    "infinity": (
        _tensors(lambda tensors: void(tensors["lm_head.weight"].view(-1)[-1:].fill_(-torch.inf))),
        "lm_head.weight holds numbers that are not finite",
    ),
    "a path outside": (_index({NORM: "../theirs.safetensors"}), "weight_map names '../theirs.safetensors': a .safe"),
    "a file that is not there": (_index({NORM: "none.safetensors"}), "none.safetensors: cannot be read: No such file"),
    "a tensor that is not there": (
        _index({"none": "other.safetensors"}),
        "lacks 'none', which model.safetensors.index",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_are_no_model(case: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    edit, message = WRONG_FILES[case]
    directory = copied(theirs["glm4_moe"], tmp_path / "changed")
    edit(directory)
    with pytest.raises(P828Error, match=re.escape(message)) as caught:
        imported(directory, tmp_path / "runs")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


WRONG_TOML: dict[str, tuple[str, str]] = {
    "a base": ('base = "quickstart"', "config.toml: unknown key base"),
    "a base elsewhere": ('base = "../secret.toml"', "config.toml: unknown key base"),
    "no key": ("[model]\nhidden = 1", "config.toml: unknown key model.hidden"),
    "a value": ('[data]\nsequence_length = "a"', "config.toml: data.sequence_length = 'a': a whole number is accepted"),
    "no TOML": ("[", "config.toml: cannot be read as TOML: "),
}


@pytest.mark.parametrize("case", WRONG_TOML)
def test_a_config_toml_that_is_wrong(case: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    """The line names the file with its directory; no other file is read."""
    text, message = WRONG_TOML[case]
    directory = copied(theirs["glm4_moe"], tmp_path / "changed")
    (tmp_path / "secret.toml").write_text("[secret]\nkey = 1")
    (directory / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{directory}/{message}")):
        imported(directory, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_fifo_in_a_files_place(name: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(theirs["glm4_moe"], tmp_path / "changed")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ConfigError, match=re.escape(f"{directory / name}: cannot be read") + ".*not a regular file"):
        imported(directory, tmp_path / "runs")
