"""What the tests of models in transformers share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from export_cases import NATIVE
from hub_models import MODELS, save_theirs
from own_export import write_own_export

from exported import save_model
from p828.model.transformer import Transformer
from tiny import tiny_model


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """flex_attention's mask, which transformers would compile for ten seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="session")
def export(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_export(model, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a random model of 44 thousand parameters, which glm4_moe is exactly."""
    return save_model(tmp_path_factory.mktemp("saved") / "run", tiny_model(**NATIVE))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each architecture, which a test copies before it changes it."""
    directory = tmp_path_factory.mktemp("theirs")
    for name in ("glm4_moe", "mimo_v2_flash", "mixtral", "qwen3_moe", "llama"):
        save_theirs(directory / name, *MODELS[name])
    return {path.name: path for path in directory.iterdir()}
