"""One step of several sequences by the decoding kernels."""

import torch
from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.inference.decode.weights import DecodeWeights
from p828.kernels.decode import ops
from p828.model.rope import attention_factor
from p828.model.transformer import Transformer


def kernel_step(
    weights: DecodeWeights,
    model: Transformer,
    cache: SlotCache,
    arrivals_TG: Tensor,
    tokens_T: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits after the newest tokens, float32 (T, V), and the routed experts, int32 (L, T, K).

    The tokens' keys and values join the cache. `arrivals_TG`: as for `ops.attention`. The host reads nothing from the
    device.
    """
    config, eps = model.config, model.config.rms_norm_eps
    dtype = weights.embedding_VH.dtype
    factor = attention_factor(config.rope_scaling.factor)
    x_TH, parts_TJH = weights.embedding_VH[tokens_T], None
    experts = []
    for layer, keys_SGCD, values_SGCD in zip(weights.layers, cache.keys, cache.values, strict=True):
        qkv_TX, x_TH = ops.norm_linear(x_TH, parts_TJH, layer.input_norm_H, eps, layer.qkv_XH, dtype)
        attended_TX = ops.attention(
            qkv_TX.unflatten(1, (-1, config.head_dim)), keys_SGCD, values_SGCD, slots_T, positions_T,
            model.frequencies, factor, layer.q_norm_D, layer.k_norm_D, layer.sinks_N, eps, arrivals_TG,
            [weight for weight in (layer.o_proj_HX, layer.shared_gate_up_SPH, layer.shared_down_SHI) if weight is not None],
        )  # fmt: skip
        added_TH = ops.linear(attended_TX, layer.o_proj_HX, dtype)
        x_TH, normed_TH, experts_TJ, weights_TJ = ops.route(
            x_TH, added_TH[:, None], layer.post_norm_H, eps, layer.router_EH, layer.bias_E,
            config.num_experts_per_tok, config.n_shared_experts, config.scoring_func, config.n_group,
            config.topk_group, config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        parts_TJH = ops.experts(
            normed_TH, experts_TJ, weights_TJ, layer.gate_up_EPH, layer.down_EHI, layer.shared_gate_up_SPH,
            layer.shared_down_SHI, config.hidden_act,
        )  # fmt: skip
        experts.append(experts_TJ[:, : config.num_experts_per_tok])
    logits_TV, _ = ops.norm_linear(x_TH, parts_TJH, weights.norm_H, eps, weights.head_VH, torch.float32)
    return logits_TV, torch.stack(experts)
