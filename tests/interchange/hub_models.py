"""Small models of transformers, as they lie in a directory from the hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exported import letters
from p828.interchange.origin import read_hub_origin
from p828.train.weights_only import write_run

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


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
