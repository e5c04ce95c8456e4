"""Configuration of p828's Mixture-of-Experts transformer."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class P828Config(PreTrainedConfig):
    """Grouped-query attention with sinks, and experts chosen by a router with correction bias.

    `attention_sinks`: one learned logit a head in the softmax's denominator. `use_qk_norm`: RMSNorm on each head's
    queries and keys before RoPE. `scoring_func`: how router logits become scores. `n_group`, `topk_group`: the experts
    are split into groups, of which a token may choose from these many. `norm_topk_prob`: the chosen experts' weights
    sum to `routed_scaling_factor`. `n_shared_experts`: experts applied to every token, as one of their joint width.
    `hidden_act`: `swiglu` is silu(W1 x) * W3 x; `swiglu_of_product` is SwiGLU over the two halves of W1 x * W3 x, with
    W1 and W3 twice as wide. `rope_parameters`: of type `default`, or `yarn` over the whole head.
    """

    model_type = "p828"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts"}

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.self_attn": "local_params",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    moe_intermediate_size: int = 768
    num_hidden_layers: int = 1
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    use_qk_norm: bool = False
    attention_sinks: bool = True
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    hidden_act: Literal["swiglu", "swiglu_of_product"] = "swiglu"
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ("default", "yarn"):
            raise ValueError(f"rope_type = {rope_type!r}: this model has 'default' and 'yarn'")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor: this model rotates whole heads, a factor of 1.0")
        self.base_model_tp_plan = {name: style for name, style in self.base_model_tp_plan.items() if self._has(name)}

    def _has(self, name: str) -> bool:
        """Whether a line of the tensor parallel plan is about this model."""
        if "sinks" in name:
            return self.attention_sinks
        if "shared_experts" in name and self.n_shared_experts == 0:
            return False
        # SwiGLU over the halves of a product needs both halves, which columns in order would put on different ranks.
        return "mlp" not in name or self.hidden_act == "swiglu"


__all__ = ["P828Config"]
