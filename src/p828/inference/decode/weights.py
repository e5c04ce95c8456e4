"""A model's weights as the decoding kernels read them."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from p828.model.experts import Experts, SharedExperts
from p828.model.transformer import Layer, Transformer


class LayerWeights(NamedTuple):
    """Norms, sinks and the router are float32. The shared experts are cut into experts of the routed ones' width."""

    input_norm_H: Tensor
    qkv_XH: Tensor
    """The three projections one below the other; X = (N + 2 G) · D."""
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    sinks_N: Tensor | None
    o_proj_HX: Tensor
    post_norm_H: Tensor
    router_EH: Tensor
    bias_E: Tensor
    gate_up_EPH: Tensor
    """P = 2 I, or 4 I for `swiglu_of_product`."""
    down_EHI: Tensor
    shared_gate_up_SPH: Tensor | None
    shared_down_SHI: Tensor | None


class DecodeWeights(NamedTuple):
    embedding_VH: Tensor
    layers: list[LayerWeights]
    norm_H: Tensor
    head_VH: Tensor


def decode_weights(model: Transformer, vocab_size: int, dtype: torch.dtype) -> DecodeWeights:
    """Matrices in `dtype`: the model's own where they are stored in it, but for those that are joined or cut.

    The head has the rows of the tokens below `vocab_size`.
    """
    return DecodeWeights(
        model.model.embed_tokens.weight.detach().to(dtype),
        [_layer_weights(layer, dtype) for layer in model.layers],
        model.model.norm.weight.detach().float(),
        model.head_weight.detach()[:vocab_size].to(dtype),
    )


def _layer_weights(layer: Layer, dtype: torch.dtype) -> LayerWeights:
    attention, moe = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    norms = (attention.q_norm, attention.k_norm)
    q_norm_D, k_norm_D = (
        cast(Tensor, norm.weight).detach().float() if attention.use_qk_norm else None for norm in norms
    )
    shared = (None, None) if moe.shared_experts is None else _shared(moe.shared_experts, moe.experts, dtype)
    return LayerWeights(
        layer.input_layernorm.weight.detach().float(),
        torch.cat([projection.weight.detach().to(dtype) for projection in projections]),
        q_norm_D,
        k_norm_D,
        None if attention.sinks is None else attention.sinks.detach().float(),
        attention.o_proj.weight.detach().to(dtype),
        layer.post_attention_layernorm.weight.detach().float(),
        moe.gate.weight.detach().float(),
        moe.gate.e_score_correction_bias,
        moe.experts.gate_up_proj.detach().to(dtype),
        moe.experts.down_proj.detach().to(dtype),
        *shared,
    )


def _shared(shared: SharedExperts, routed: Experts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gate and up (S, P, H), and down (S, H, I), of S experts whose sum is the shared experts' output."""
    inner = routed.down_proj.shape[2]
    down_HX = shared.down_proj.weight.detach().to(dtype)  # X = S · I
    count = down_HX.shape[1] // inner
    parts = []
    for projection in (shared.gate_proj, shared.up_proj):
        # Rows I at a time: of `swiglu_of_product` those of both halves, which are S · I apart.
        halves = projection.weight.detach().to(dtype).unflatten(0, (-1, count, inner))
        parts.append(halves.transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1).contiguous(), down_HX.unflatten(1, (count, inner)).transpose(0, 1).contiguous()
