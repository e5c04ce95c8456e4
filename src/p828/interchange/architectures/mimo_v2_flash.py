"""`mimo_v2_flash` (MiMo-V2-Flash): p828's model with sinks, without a shared expert and without norms on q and k.

Its sliding layers have the sinks. A window of the whole context makes them see everything.
"""

from collections.abc import Mapping
from typing import Any

from p828.config import ModelConfig
from p828.config.values import shown
from p828.errors import ConfigError
from p828.interchange.architectures import architecture
from p828.interchange.architectures.architecture import Architecture, Piece, rope_parameters
from p828.interchange.architectures.config_json import Fields, Need, checked, read_common, read_router

SLIDING = "sliding_attention"
SAME = (  # fields of both, with one meaning
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "max_position_embeddings", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
VALUE_SCALE = Need("attention_value_scale", 1.0, 1.0, "a factor on attention's values")


def obstacles(config: ModelConfig) -> list[str]:
    found = {
        "no sinks": not config.attention_sinks,
        "shared expert": config.n_shared_experts > 0,
        "norms on q and k": config.use_qk_norm,
        "softmax router": config.scoring_func != "sigmoid",
        config.hidden_act: config.hidden_act != "swiglu",
        "an odd number of key-value heads": config.num_key_value_heads % 2 == 1,
        "a single expert": config.n_routed_experts == 1,  # its router sums the two best of a group
    }
    return [words for words, is_there in found.items() if is_there]


def to_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "mimo_v2_flash",
        **{name: getattr(config, name) for name in SAME},
        "num_key_value_heads": config.num_key_value_heads // 2,  # sliding layers have twice as many
        "v_head_dim": config.head_dim,
        "attention_value_scale": 1.0,
        "layer_types": [SLIDING] * config.num_hidden_layers,
        "sliding_window": config.max_position_embeddings,  # tokens, the query's own among them
        "mlp_layer_types": ["sparse"] * config.num_hidden_layers,
        "hidden_act": "silu",
        "intermediate_size": config.moe_intermediate_size,  # of dense layers, of which there are none
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {SLIDING: rope_parameters(config)},
    }


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    if name.endswith(".self_attn.sinks"):  # transformers calls them `sinks`, its files on the hub do not
        return [Piece(name.removesuffix("sinks") + "attention_sink_bias", ())]
    return architecture.pieces(name, config)


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field of theirs that p828 does not have."""
    fields = Fields(values)
    layers, context = (fields.read(name, int) for name in ("num_hidden_layers", "max_position_embeddings"))
    for name, every in (("layer_types", SLIDING), ("mlp_layer_types", "sparse")):
        if (found := fields.read(name, list)) != [every] * len(found) or len(found) != layers:
            raise ConfigError(f"{name} = {shown(found)}: p828's layers are all alike; {every!r} for each is accepted")
    if fields.read("sliding_window", int) < context:
        raise ConfigError(
            f"sliding_window = {values['sliding_window']}: p828 has no windows; "
            f"at least max_position_embeddings = {context} is accepted"
        )
    common = read_common(fields, Fields(fields.read("rope_parameters", dict)).read(SLIDING, dict))
    common["num_key_value_heads"] *= 2  # sliding layers have twice as many
    fields.check([Need("v_head_dim", common["head_dim"], 128, "values of another width than keys"), VALUE_SCALE])
    return checked(
        ModelConfig(
            **common,
            **read_router(fields),
            moe_intermediate_size=fields.read("moe_intermediate_size", int),
            n_shared_experts=0,
            use_qk_norm=False,
            attention_sinks=True,
        )
    )


MIMO_V2_FLASH = Architecture(
    model_type="mimo_v2_flash",
    class_name="MiMoV2FlashForCausalLM",
    obstacles=obstacles,
    to_config=to_config,
    pieces=pieces,
)
