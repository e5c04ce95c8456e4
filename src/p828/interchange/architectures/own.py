"""`p828`: our own architecture for transformers, of a model that none of transformers' is exactly.

An export in it carries the code of the model (`remote_code/`), which transformers runs if it is trusted.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from p828.config import ModelConfig
from p828.config.values import build
from p828.interchange.architectures.architecture import Architecture, Piece, rope_parameters
from p828.interchange.architectures.config_json import Fields, checked, read_rope, rope_table

SAME = (  # the configuration's own names are ours
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "use_qk_norm", "attention_sinks", "max_position_embeddings", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "norm_topk_prob",
    "routed_scaling_factor", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
AUTO_MAP = {  # the configuration first: vLLM loads them in this order
    "AutoConfig": "configuration_p828.P828Config",
    "AutoModel": "modeling_p828.P828Model",
    "AutoModelForCausalLM": "modeling_p828.P828ForCausalLM",
}
CODE = ("configuration_p828.py", "attention_p828.py", "modeling_p828.py")


def obstacles(config: ModelConfig) -> list[str]:
    return []


def to_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "p828",
        "auto_map": AUTO_MAP,
        **{name: getattr(config, name) for name in SAME},
        "rope_parameters": rope_parameters(config),
    }


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field that is none of ours."""
    fields = Fields(values)
    own = {name: fields.read(name, type(getattr(ModelConfig(), name))) for name in SAME}
    theta, scaling = read_rope(rope_table(fields, theta=10000.0), own["max_position_embeddings"])
    model = build(ModelConfig, {**own, "rope_theta": theta}, "model")
    return checked(replace(model, rope_scaling=scaling))


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    """Our names, and a layer's experts as the two stacked tensors that they are in the model."""
    return [] if config.tie_word_embeddings and name == "lm_head.weight" else [Piece(name, ())]


def code_files() -> list[Path]:
    """What an export carries beside its weights, under the same names."""
    return [Path(__file__).parent / "remote_code" / name for name in CODE]


OWN = Architecture(
    model_type="p828", class_name="P828ForCausalLM", obstacles=obstacles, to_config=to_config, pieces=pieces
)
