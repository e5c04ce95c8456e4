import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p828.config import Config, DataConfig, TokenizerConfig, TrainConfig
from p828.config.values import to_dict
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.engine.plain import PlainEngine
from p828.errors import ConfigError, DataError
from p828.inference import load
from p828.inference.generate import generate
from p828.inference.load import load_model
from p828.inference.sampling_config import SamplingConfig
from p828.train import checkpoint_writer
from tiny import tiny_config, tiny_model

CONFIG = Config(
    name="run",
    model=tiny_config(),
    data=DataConfig(sequence_length=32),
    tokenizer=TokenizerConfig(name="tokenizer.json"),
)


def save_run(directory: Path, tokenizer: Tokenizer, tensors: dict[str, Tensor], config: Config = CONFIG) -> Path:
    for step in (10, 20):
        state = {"config": to_dict(config), "tokenizer": tokenizer.fingerprint()}
        checkpoint_writer.save(directory / "checkpoints", step, {"model": tensors, "optimizer": {}}, state)
    tokenizer.save(directory / "tokenizer.json")
    return directory


def test_from_a_run_a_checkpoint_and_within(
    tmp_path: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    run = save_run(tmp_path / "run", letters, model.state_dict())
    config = SamplingConfig(temperature=0.0, max_new_tokens=8)
    expected = generate(model, letters, ["abc"], config)

    for path, step in ((run, 20), (run / "checkpoints" / "step_00000010", 10), (str(run / "checkpoints"), 20)):
        loaded = load_model(path, "cpu")
        assert loaded.step == step
        assert loaded.config == CONFIG
        assert not loaded.model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor)
        assert generate(loaded.model, loaded.tokenizer, ["abc"], config) == expected

    monkeypatch.chdir(run / "checkpoints" / "step_00000010")
    assert load_model(".", "cpu").step == 10


def test_in_bfloat16_it_is_what_training_computed_with(tmp_path: Path, letters: Tokenizer) -> None:
    """Bit for bit, although the checkpoint holds float32 weights."""
    train = TrainConfig(dtype="bfloat16", device="cpu")
    config = dataclasses.replace(CONFIG, train=train)
    engine = PlainEngine(config)
    loaded = load_model(save_run(tmp_path / "run", letters, engine.state_dict()["model"], config), "cpu")
    assert loaded.dtype == loaded.model.head_weight.dtype == torch.bfloat16
    expected = engine.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def changed(tensors: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.embed_tokens.weight", torch.zeros(96, 32), r"has the shape \[96, 32\], .* it is \[97, 32\]"),
        ("model.layers.1.self_attn.sinks", None, r"lack model.layers.1.self_attn.sinks, .* \[4\]"),
        ("model.layers.2.norm.weight", torch.zeros(3), "hold model.layers.2.norm.weight, which"),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    tmp_path: Path, letters: Tokenizer, name: str, tensor: Tensor | None, message: str
) -> None:
    run = save_run(tmp_path / "run", letters, changed(tiny_model().state_dict(), name, tensor))
    with pytest.raises(DataError, match=message) as raised:
        load_model(run, "cpu")
    assert "step_00000020" in str(raised.value)
    assert name in str(raised.value)


def test_a_checkpoint_of_another_shape(tmp_path: Path, letters: Tokenizer) -> None:
    run = save_run(tmp_path / "run", letters, tiny_model(hidden_size=16).state_dict())
    with pytest.raises(DataError, match=r"model.embed_tokens.weight has the shape \[97, 16\], .* \[97, 32\]"):
        load_model(run, "cpu")


def test_what_is_missing_is_named(tmp_path: Path, letters: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_model(tmp_path / "nowhere", "cpu")
    run = save_run(tmp_path / "run", letters, tiny_model().state_dict())
    (run / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"run/tokenizer.json: no such file"):
        load_model(run, "cpu")
    checkpoint_writer.save(tmp_path / "bare" / "checkpoints", 1, {"model": {}}, {})
    with pytest.raises(DataError, match="step_00000001: holds no configuration"):
        load_model(tmp_path / "bare", "cpu")


def test_another_tokenizer_than_the_checkpoint_was_trained_with(
    tmp_path: Path, letters: Tokenizer, byte_level: Tokenizer
) -> None:
    model = tiny_model(vocab_size=300)
    run = save_run(tmp_path / "run", letters, model.state_dict(), dataclasses.replace(CONFIG, model=model.config))
    byte_level.save(run / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"step_00000020: trained with another tokenizer"):
        load_model(run, "cpu")


def test_a_tokenizer_beyond_the_model(tmp_path: Path, byte_level: Tokenizer) -> None:
    run = save_run(tmp_path / "run", byte_level, tiny_model().state_dict())
    with pytest.raises(ConfigError, match=r"tokenizer.json: its vocabulary of 275 exceeds model.vocab_size = 97"):
        load_model(run, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_when_one_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^device = "cuda".*"auto" or "cpu"'):
        load_model(tmp_path, "cuda")


@pytest.mark.parametrize(
    "model, capability, backend, dtype",
    [
        ({}, (9, 0), "auto", torch.bfloat16),
        ({"head_dim": 12}, (9, 0), "reference", torch.float32),
        ({"hidden_size": 36, "attention_backend": "flash"}, (9, 0), "reference", torch.float32),
        ({"head_dim": 264}, (9, 0), "reference", torch.float32),
        ({}, (7, 5), "auto", torch.float32),
    ],
)
def test_what_a_gpus_kernels_do_not_take_is_computed_plainly(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], capability: tuple[int, int], backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = dataclasses.replace(CONFIG, model=tiny_config(**model))
    sizes, chosen = load._arithmetic(config, torch.device("cuda"))
    assert (sizes.attention_backend, chosen) == (backend, dtype)
    assert dataclasses.replace(sizes, attention_backend=config.model.attention_backend) == config.model
