"""transformers' Glm4MoeForCausalLM of a configuration's sizes, as its users would set it up.

It has sigmoid routing, q/k norm and a shared expert; it has no sinks, and is not asked to mask documents.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from p828.bench.systems import System
from peers.interface import Peer
from peers.routing import GivenTransformersExperts


def build(system: System, device: torch.device, given_experts: list[Tensor]) -> Peer:
    """bfloat16 weights on a GPU, float32 on a CPU."""
    sizes = system.config.model
    config = transformers.Glm4MoeConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.moe_intermediate_size,
        moe_intermediate_size=sizes.moe_intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        n_routed_experts=sizes.n_routed_experts,
        n_shared_experts=sizes.n_shared_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
        norm_topk_prob=sizes.norm_topk_prob,
        routed_scaling_factor=sizes.routed_scaling_factor,
        rms_norm_eps=sizes.rms_norm_eps,
        tie_word_embeddings=sizes.tie_word_embeddings,
        initializer_range=sizes.initializer_range,
        max_position_embeddings=sizes.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta, "partial_rotary_factor": 1.0},
        use_qk_norm=True,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        experts_implementation=system.options.get("experts", "grouped_mm"),
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.Glm4MoeForCausalLM(config).to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    for layer, experts_TK in zip(model.model.layers, given_experts, strict=False):
        layer.mlp.experts = GivenTransformersExperts(layer.mlp.experts, experts_TK.to(device))
    loss = _liger_loss(model) if system.options.get("has_liger_head") else _loss(model, system)

    def forward_backward(tokens_BS: Tensor, targets_BS: Tensor, num_targets: Tensor) -> Tensor:
        value = loss(tokens_BS, targets_BS) * (targets_BS.numel() / num_targets)
        value.backward()
        return value.detach()

    return Peer(model, forward_backward)


def _loss(model: nn.Module, system: System) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean nats per target of int64 (B, S) tokens and targets."""
    forward = torch.compile(model) if system.options.get("is_compiled") else model

    def loss(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = forward(input_ids=tokens_BS).logits
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())

    return loss


def _liger_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """As `_loss`, through Liger's kernel, which never holds all logits; the rest compiled."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss()
    weight_VH, decoder = model.get_parameter("lm_head.weight"), torch.compile(model.get_submodule("model"))

    def loss(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        hidden_BSH = decoder(input_ids=tokens_BS).last_hidden_state
        return head(weight_VH, hidden_BSH.flatten(0, 1), targets_BS.flatten())

    return loss
