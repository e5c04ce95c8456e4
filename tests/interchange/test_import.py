"""A model of transformers gives the same logits as a run of p828; what does not fit is named in a line."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from exported import EOS, difference, letters, logits, save_model
from p828.cli.main import dispatch
from p828.config import RopeScaling
from p828.config import load as load_config
from p828.config.values import changed
from p828.data.tokenizer import template_trial
from p828.errors import ConfigError, P828Error
from p828.inference.load import load_model
from p828.interchange.export import export_model
from p828.interchange.origin import read_hub_origin
from p828.train.weights_only import write_run
from tiny import tiny_model

TOLERANCE = 1e-5  # as of exports: test_equal_logits
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
GLM4_MOE: dict[str, Any] = {
    **SIZES, **EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 0, "num_mtp_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("glm4_moe", {**GLM4_MOE, "n_shared_experts": 2, "routed_scaling_factor": 1.7}),
    "glm4_moe, groups, norms, YaRN, tied": (
        "glm4_moe",
        {
            **GLM4_MOE, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            **SIZES, **EXPERTS, "n_routed_experts": 8, "num_key_value_heads": 1, "v_head_dim": 8,
            "attention_value_scale": 1.0, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2,
            "mlp_layer_types": ["sparse"] * 2, "rope_parameters": {"sliding_attention": YARN},
        },
    ),
    "mixtral": ("mixtral", {**SIZES, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 3}),
    "qwen3_moe": ("qwen3_moe", {**SIZES, **EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "qwen3_moe, raw weights": ("qwen3_moe", {**SIZES, **EXPERTS, "num_experts": 8, "norm_topk_prob": False}),
    "llama": ("llama", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "tie_word_embeddings": True}),
}  # fmt: skip


def save_theirs(directory: Path, model_type: str, values: dict[str, Any], **saving: Any) -> Any:
    """A model of transformers in which every tensor matters, saved with a tokenizer; returns the model."""
    config = AutoConfig.for_model(model_type, **values, eos_token_id=89, bos_token_id=None)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "sinks", "e_score_correction_bias")):
                tensor.add_(0.2 * torch.randn(tensor.shape))
            else:
                tensor.copy_((0.5 if name.endswith("gate.weight") else 0.1) * torch.randn(tensor.shape))
    model.save_pretrained(directory, **saving)
    letters().save(directory / "tokenizer.json")
    return model


def imported(directory: Path, runs: Path) -> Path:
    return write_run(read_hub_origin(directory), "imported", str(runs))


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model_type, values = MODELS[case]
    is_sharded = case == "mixtral"
    theirs = save_theirs(tmp_path / "theirs", model_type, values, max_shard_size="50KB" if is_sharded else "5GB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == is_sharded
    ours = load_model(imported(tmp_path / "theirs", tmp_path / "runs"))
    tokens = torch.randint(97, (2, 64))
    expected = theirs(tokens).logits
    assert expected.std() > 0.05
    assert difference(logits(ours.model, tokens), expected) < TOLERANCE
    assert ours.tokenizer.fingerprint() == letters().fingerprint()


EXPORTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"attention_sinks": False, "use_qk_norm": True},
    "glm4_moe without shared": {"attention_sinks": False, "n_shared_experts": 0},
    "mimo_v2_flash": {"n_shared_experts": 0, "rope_scaling": RopeScaling(2.0, 32)},
    "p828": {"hidden_act": "swiglu_of_product", "scoring_func": "softmax", "mask_documents": False},
}


SAME_FILES = (
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """float32 exported, imported and exported again are the same bytes; bfloat16 are the same numbers in float32."""
    model = tiny_model(**EXPORTS[case])
    run = save_model(tmp_path / "run", model)
    for dtype in ("float32", "bfloat16"):
        export_model(run, tmp_path / f"first_{dtype}", dtype)  # type: ignore[arg-type]
        back = write_run(read_hub_origin(tmp_path / f"first_{dtype}"), dtype, str(tmp_path / "runs"))
        export_model(back, tmp_path / f"second_{dtype}", dtype)  # type: ignore[arg-type]
        for file in SAME_FILES:
            first, second = ((tmp_path / f"{time}_{dtype}" / file).read_bytes() for time in ("first", "second"))
            assert first == second, file
        loaded = load_model(back)
        assert (loaded.config.model, loaded.step) == (model.config, 10)
        stored = load_file(tmp_path / f"first_{dtype}" / "model.safetensors")
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(loaded.model.state_dict()[name], stored[name].float())


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


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each architecture, which a test copies before it changes it."""
    directory = tmp_path_factory.mktemp("theirs")
    for name in ("glm4_moe", "mimo_v2_flash", "mixtral", "qwen3_moe", "llama"):
        save_theirs(directory / name, *MODELS[name])
    return {path.name: path for path in directory.iterdir()}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


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


def test_the_tokenizers_settings(theirs: dict[str, Path], tmp_path: Path) -> None:
    """Its end token, which the model's settings need not name, and its chat template."""
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    directory = copied(theirs["llama"], tmp_path / "changed")
    settings = {"eos_token": {"content": EOS}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "eos_token_id": 5}))
    tokenizer = load_model(imported(directory, tmp_path / "runs")).tokenizer
    assert tokenizer.eos_id == 89
    assert tokenizer.template is not None
    assert tokenizer.template.source == template


LOOPS = "{% for number in range(99999) %}" * 3 + "{% endfor %}" * 3
ENDLESS = {"when it writes": LOOPS, "when it is compiled": "{{ 9 ** (9 ** 9) }}"}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_chat_template_without_end(
    case: str, theirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 1.0)
    directory = copied(theirs["llama"], tmp_path / "changed")
    (directory / "chat_template.jinja").write_text(ENDLESS[case])
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: not usable as a chat template: writing two messages"):
        imported(directory, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_command(
    theirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dispatch(["import", str(theirs["qwen3_moe"])]) == 0
    assert "run            runs/qwen3_moe" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("some words to measure " * 9)
    assert dispatch(["evaluate", "runs/qwen3_moe", "--data.sequence-length", "16"]) == 2
    assert "a model that was imported has no text of its own: give --data.files" in capsys.readouterr().err
    assert dispatch(["evaluate", "runs/qwen3_moe", "--data.files", "text.txt"]) == 0
    assert "text           all rows of" in capsys.readouterr().out
    assert dispatch(["generate", "runs/qwen3_moe", "--prompt", "ab", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert dispatch(["train", "runs/qwen3_moe"]) == 2
    assert "holds weights only, without an optimizer's state to go on with" in capsys.readouterr().err
    assert dispatch(["import", str(theirs["llama"]), "--name", "qwen3_moe"]) == 2
    assert "there is something in it; a new directory is accepted" in capsys.readouterr().err
    assert dispatch(["import", "runs/qwen3_moe"]) == 2
    assert "no config.json is there; give the directory of a model" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["qwen3_moe"]


def test_a_model_in_a_runs_place(theirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(theirs["llama"])
    assert dispatch(["train", path]) == 2
    assert f"p828 train CONFIG --name NEW --train.init-from {path}" in capsys.readouterr().err
    assert dispatch(["generate", path, "--prompt", "ab"]) == 2
    assert f"p828 import {path} makes a run of it" in capsys.readouterr().err


def test_a_name_that_is_none(theirs: dict[str, Path], tmp_path: Path) -> None:
    assert dispatch(["import", str(theirs["llama"]), "--name", "a/b", "--runs-dir", str(tmp_path / "runs")]) == 2
    with pytest.raises(ConfigError):
        read_hub_origin(tmp_path / "nothing")


HARMFUL: dict[str, dict[str, Any]] = {
    "data": {"source": "files", "files": ["/etc/passwd"], "prepared": "/tmp/prepared", "hub_name": "some/where"},
    "tokenizer": {"name": "some/where", "chat_template": "/etc/passwd"},
    "train": {"init_from": "/somewhere", "steps": 7},
    "evaluation": {"tasks": ["foreign"], "tasks_path": "/tmp/code", "prompts": ["ab"]},
    "deepspeed": {"config": "/tmp/deepspeed.json"},
    "wandb": {"mode": "online", "project": "theirs"},
    "trackers": {"tensorboard": True, "trackio": True, "trackio_project": "theirs"},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "model": {"mask_documents": False, "dropout": 0.25},
    "data": {"sequence_length": 17, "text_field": "content"},
    "tokenizer": {"vocab_size": 90},
}


def test_only_what_describes_a_model_is_taken_from_its_config_toml(theirs: dict[str, Path], tmp_path: Path) -> None:
    """All else would decide what a later run of the user's reads, executes and sends."""
    directory = copied(theirs["glm4_moe"], tmp_path / "changed")
    plain = read_hub_origin(directory).config
    values = {key: {**HARMFUL.get(key, {}), **HARMLESS.get(key, {})} for key in {**HARMFUL, **HARMLESS}}
    values = {"runs_dir": "/tmp/theirs", "name": "theirs", "engine": "deepspeed", **values}
    (directory / "config.toml").write_text(tomli_w.dumps(values))
    found = read_hub_origin(directory).config
    expected = {f"{table}.{key}": value for table, keys in HARMLESS.items() for key, value in keys.items()}
    assert found == changed(plain, expected)
    run = load_config(str(imported(directory, tmp_path / "runs")))
    assert found == changed(run, {"name": "", "runs_dir": "runs"})


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
