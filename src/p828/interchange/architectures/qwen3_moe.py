"""`qwen3_moe`: p828's model with a softmax router and norms on q and k; read, not written."""

from collections.abc import Mapping
from typing import Any

from p828.config import ModelConfig
from p828.interchange.architectures import architecture
from p828.interchange.architectures.architecture import Piece
from p828.interchange.architectures.config_json import Fields, Need, checked, read_common, rope_table

NEEDS = (
    Need("use_sliding_window", False, False, "sliding windows"),
    Need("decoder_sparse_step", 1, 1, "dense layers between those with experts"),
    Need("mlp_only_layers", [], [], "dense layers between those with experts"),
)


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field of theirs that p828 does not have."""
    fields = Fields(values)
    fields.check(NEEDS)
    experts = "num_experts" if "num_experts" in values else "num_local_experts"
    return checked(
        ModelConfig(
            **read_common(fields, rope_table(fields, theta=10000.0)),
            moe_intermediate_size=fields.read("moe_intermediate_size", int),
            n_routed_experts=fields.read(experts, int),
            num_experts_per_tok=fields.read("num_experts_per_tok", int),
            n_shared_experts=0,
            scoring_func="softmax",
            norm_topk_prob=fields.read("norm_topk_prob", bool, False),
            use_qk_norm=True,
            attention_sinks=False,
        )
    )


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    return [] if name.endswith(".e_score_correction_bias") else architecture.pieces(name, config)
