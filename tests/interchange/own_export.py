"""Exports in our own architecture of models that are in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from p828.interchange.own import OWN, code_files
from p828.model.transformer import Transformer


def own_tensors(model: Transformer) -> dict[str, Tensor]:
    """A model's tensors under the names that an export gives them."""
    state = model.state_dict()
    return {
        piece.name: tensor.detach()[piece.place].clone()
        for name, tensor in state.items()
        for piece in OWN.pieces(name, model.config)
    }


def write_own_export(model: Transformer, directory: Path, files: int = 1, **changes: Any) -> Path:
    """The weights in this many files, an index if there are several, the code, and config.json with `changes`."""
    directory.mkdir(parents=True)
    for file in code_files():
        shutil.copy(file, directory)
    tensors = own_tensors(model)
    names = (
        [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    )
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t, file in weight_map.items() if file == name}, directory / name, {"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": [OWN.class_name],
        **OWN.to_config(model.config),
        "dtype": "float32",
        "eos_token_id": 96,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def load(directory: Path, implementation: str = "eager", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, attn_implementation=implementation, **options
    ).eval()


def like(model: Transformer, tokens: Tensor, **inputs: Any) -> Tensor:
    """p828's own logits."""
    with torch.no_grad():
        return model.logits(model(tokens, **inputs).hidden_BSH)
