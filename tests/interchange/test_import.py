"""A model of transformers gives the same logits as a run of p828, by the command `p828 import`, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hub_models import MODELS, copied, imported, save_theirs
from safetensors.torch import load_file

from exported import EOS, difference, letters, logits, save_model
from p828.cli.main import dispatch
from p828.config import RopeScaling
from p828.config import load as load_config
from p828.config.values import changed
from p828.data.tokenizer import template_trial
from p828.errors import ConfigError
from p828.inference.load import load_model
from p828.interchange.export import export_model
from p828.interchange.origin import read_hub_origin
from p828.train.weights_only import write_run
from tiny import tiny_model

TOLERANCE = 1e-5  # as of exports: test_equal_logits


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
