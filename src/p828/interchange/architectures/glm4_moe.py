"""`glm4_moe` (GLM-4.5): p828's model without sinks and with `swiglu`, to the last bit of its mathematics."""

from collections.abc import Mapping
from typing import Any

from p828.config import ModelConfig
from p828.interchange.architectures import architecture
from p828.interchange.architectures.architecture import Architecture, Piece, rope_parameters
from p828.interchange.architectures.config_json import Fields, Need, checked, read_common, read_router, rope_table

SAME = (  # fields of both, with one meaning
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "use_qk_norm", "max_position_embeddings", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
NEEDS = (
    Need("first_k_dense_replace", 0, 1, "leading dense layers"),
    Need("num_mtp_layers", 0, 0, "layers that predict further tokens"),
    Need("num_nextn_predict_layers", 0, 0, "layers that predict further tokens"),
)


def obstacles(config: ModelConfig) -> list[str]:
    found = {
        "sinks": config.attention_sinks,
        "softmax router": config.scoring_func != "sigmoid",
        config.hidden_act: config.hidden_act != "swiglu",
        "a single expert": config.n_routed_experts == 1,  # its router sums the two best of a group
    }
    return [words for words, is_there in found.items() if is_there]


def to_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        **{name: getattr(config, name) for name in SAME},
        "hidden_act": "silu",
        "intermediate_size": config.moe_intermediate_size,  # of leading dense layers, of which there are none
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope_parameters(config),
    }


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    """With `n_shared_experts = 0` it has a shared expert all the same, of width 0: empty tensors, which add nothing."""
    found = architecture.pieces(name, config)
    if config.n_shared_experts == 0 and name.endswith(".experts.gate_up_proj"):
        shared = name.removesuffix("experts.gate_up_proj") + "shared_experts"
        found += [Piece(f"{shared}.{projection}.weight", (0, slice(0, 0))) for projection in ("gate_proj", "up_proj")]
    if config.n_shared_experts == 0 and name.endswith(".experts.down_proj"):
        shared = name.removesuffix("experts.down_proj") + "shared_experts"
        found.append(Piece(f"{shared}.down_proj.weight", (0, slice(None), slice(0, 0))))
    return found


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field of theirs that p828 does not have."""
    fields = Fields(values)
    fields.check(NEEDS)
    return checked(
        ModelConfig(
            **read_common(fields, rope_table(fields, theta=10000.0, partial_rotary_factor=0.5)),
            **read_router(fields),
            moe_intermediate_size=fields.read("moe_intermediate_size", int),
            n_shared_experts=fields.read("n_shared_experts", int, 1),
            use_qk_norm=fields.read("use_qk_norm", bool, False),
            attention_sinks=False,
        )
    )


GLM4_MOE = Architecture(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    obstacles=obstacles,
    to_config=to_config,
    pieces=pieces,
)
