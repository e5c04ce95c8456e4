"""One step of several sequences by the decoding kernels."""

from typing import NamedTuple

from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.inference.decode.rows import Rows
from p828.inference.decode.weights import DecodeWeights
from p828.kernels.decode import ops
from p828.model.rope import attention_factor
from p828.model.transformer import Transformer


class Step(NamedTuple):
    logits_TV: Tensor
    """float32, after the newest tokens."""
    experts_LTJ: list[Tensor]
    """int32, of each layer; the routed experts come first."""


def kernel_step(
    weights: DecodeWeights, model: Transformer, cache: SlotCache, rows: Rows, arrivals_TG: Tensor, slots_T: Tensor
) -> Step:
    """Read the newest tokens of some slots (int64); their keys and values join the cache. The host reads nothing.

    `arrivals_TG`: as for `ops.attention`; all kernels count in it, one after another.
    """
    config, eps = model.config, model.config.rms_norm_eps
    factor = attention_factor(config.rope_scaling.factor)
    first = weights.layers[0]
    qkv_TX, x_TH = ops.embed_norm_linear(
        weights.embedding_VH, slots_T, rows.token_S, first.input_norm_H, eps, first.qkv_XH
    )
    parts_TXH: Tensor | None = None
    experts = []
    for layer, keys_SGCD, values_SGCD in zip(weights.layers, cache.keys, cache.values, strict=True):
        if parts_TXH is not None:
            qkv_TX, x_TH = ops.norm_linear(x_TH, parts_TXH, layer.input_norm_H, eps, layer.qkv_XH, x_TH.dtype)
        added_TXH = ops.attention(
            qkv_TX.unflatten(1, (-1, config.head_dim)), keys_SGCD, values_SGCD, slots_T, rows.position_S,
            model.frequencies, factor, layer.q_norm_D, layer.k_norm_D, layer.sinks_N, eps, arrivals_TG,
            layer.o_proj_HX,
        )  # fmt: skip
        x_TH, normed_TH, experts_TJ, weights_TJ = ops.route(
            x_TH, added_TXH, layer.post_norm_H, eps, layer.router_EH, layer.bias_E,
            config.num_experts_per_tok, config.n_shared_experts, config.scoring_func, config.n_group,
            config.topk_group, config.norm_topk_prob, config.routed_scaling_factor, arrivals_TG,
        )  # fmt: skip
        parts_TXH = ops.experts(
            normed_TH, experts_TJ, weights_TJ, layer.gate_up_EPH, layer.down_EHI, layer.shared_gate_up_SPH,
            layer.shared_down_SHI, config.hidden_act,
        )  # fmt: skip
        experts.append(experts_TJ)
    logits_TV = ops.logits(x_TH, parts_TXH, weights.norm_H, eps, weights.head_VH, slots_T, rows.position_S)
    return Step(logits_TV, experts)
