"""Exports in our own architecture of models that are in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from p828.config import RopeScaling
from p828.interchange.architectures.own import OWN, code_files
from p828.model.transformer import Transformer

# Both sides are float32; they add up in another order, through two layers.
TOLERANCE = 1e-5
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
VARIANTS: dict[str, dict[str, Any]] = {
    "sinks and a shared expert": {},
    "no sinks, softmax": {"attention_sinks": False, "scoring_func": "softmax"},
    "norms, softmax": {"use_qk_norm": True, "scoring_func": "softmax", "norm_topk_prob": False},
    "product": {"hidden_act": "swiglu_of_product", "n_shared_experts": 2},
    "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "top-1 of one group": {"num_experts_per_tok": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "many experts": {"n_routed_experts": 64, "num_experts_per_tok": 8, "n_shared_experts": 0},
    "a single expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "yarn": {"rope_scaling": YARN, "rope_theta": 500.0},
    "tied": {"tie_word_embeddings": True},
    "as many keys as queries": {"num_key_value_heads": 4},
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


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
    )


def like(model: Transformer, tokens: Tensor, **inputs: Any) -> Tensor:
    """p828's own logits."""
    with torch.no_grad():
        return model.logits(model(tokens, **inputs).hidden_BSH)


def in_memory(model: Transformer, export: Path, implementation: str = "eager") -> Any:
    """The class that the export's code defines, with the weights of `model`."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(export, trust_remote_code=True)
    config = type(loaded)(**OWN.to_config(model.config), attn_implementation=implementation)
    hub = type(load(export))(config).eval()
    missing, unexpected = hub.load_state_dict(own_tensors(model), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    hub.tie_weights()
    return hub
