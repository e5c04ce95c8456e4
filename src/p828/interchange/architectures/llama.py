"""`llama` and `qwen3`: dense models, in p828 one expert that every token goes to with the weight 1; read, not written.

qwen3 has norms on q and k.
"""

from collections.abc import Mapping
from typing import Any

from p828.config import ModelConfig
from p828.interchange.architectures import architecture
from p828.interchange.architectures.architecture import Piece
from p828.interchange.architectures.config_json import Fields, Need, checked, read_common, rope_table

NEEDS = (
    Need("mlp_bias", False, False, "a bias in the experts"),
    Need("pretraining_tp", 1, 1, "matrices in slices"),
    Need("use_sliding_window", False, False, "sliding windows"),
)
QWEN3_HEAD_DIM = 128  # where its configuration does not say it
DENSE: dict[str, Any] = {
    "n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0, "norm_topk_prob": True,
    "attention_sinks": False,
}  # fmt: skip


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json. Raises ConfigError naming the field of theirs that p828 does not have."""
    return _dense(values, head_dim=None, use_qk_norm=False)


def from_config_of_qwen3(values: Mapping[str, Any]) -> ModelConfig:
    """The same of `qwen3`."""
    return _dense(values, QWEN3_HEAD_DIM, use_qk_norm=True)


def _dense(values: Mapping[str, Any], head_dim: int | None, use_qk_norm: bool) -> ModelConfig:
    fields = Fields(values)
    fields.check(NEEDS)
    return checked(
        ModelConfig(
            **read_common(fields, rope_table(fields, theta=10000.0), head_dim),
            **DENSE,
            moe_intermediate_size=fields.read("intermediate_size", int),
            use_qk_norm=use_qk_norm,
        )
    )


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    """Without a router, whose weights are 0 then: one expert gets the weight 1 whatever its score."""
    if ".mlp.gate." in name:
        return []
    return [piece._replace(name=piece.name.replace(".experts.0.", ".")) for piece in architecture.pieces(name, config)]
