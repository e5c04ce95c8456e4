"""`mixtral`: p828's model with a softmax router and nothing of what came after it; read, not written."""

from collections.abc import Mapping
from typing import Any

from p828.config import ModelConfig
from p828.interchange.architectures import architecture
from p828.interchange.architectures.architecture import Piece
from p828.interchange.architectures.config_json import Fields, Need, checked, read_common, rope_table

NEEDS = (
    Need("sliding_window", None, None, "sliding windows"),
    Need("router_jitter_noise", 0.0, 0.0, "noise on the router's input"),
)
NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field of theirs that p828 does not have."""
    fields = Fields(values)
    fields.check(NEEDS)
    return checked(
        ModelConfig(
            **read_common(fields, rope_table(fields, theta=1e6)),
            moe_intermediate_size=fields.read("intermediate_size", int),
            n_routed_experts=fields.read("num_local_experts", int),
            num_experts_per_tok=fields.read("num_experts_per_tok", int),
            n_shared_experts=0,
            scoring_func="softmax",
            norm_topk_prob=True,
            attention_sinks=False,
        )
    )


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    if name.endswith(".e_score_correction_bias"):
        return []
    found = (
        piece._replace(name=piece.name.replace(".mlp.", ".block_sparse_moe."))
        for piece in architecture.pieces(name, config)
    )
    return [piece._replace(name=_renamed(piece.name)) for piece in found]


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name
