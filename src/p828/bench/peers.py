"""Other libraries' MoE models of a configuration's sizes, as their users would set them up.

Both have sigmoid routing, q/k norm and a shared expert; neither has sinks, and neither is asked to mask documents.
"""

import importlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.bench.routing import GivenTorchtitanRouter, GivenTransformersExperts
from p828.bench.systems import System

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean nats per target of int64 (B, S) tokens and targets."""


def build_transformers(system: System, device: torch.device, given_experts: list[Tensor]) -> tuple[nn.Module, Loss]:
    """Glm4MoeForCausalLM: bfloat16 weights on a GPU, float32 on a CPU."""
    transformers = importlib.import_module("transformers")
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
        experts_implementation=system.experts,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.Glm4MoeForCausalLM(config).to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    for layer, experts_TK in zip(model.model.layers, given_experts, strict=False):
        layer.mlp.experts = GivenTransformersExperts(layer.mlp.experts, experts_TK.to(device))
    forward = torch.compile(model) if system.is_compiled else model

    def loss(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return mean_cross_entropy(forward(input_ids=tokens_BS).logits, targets_BS)

    return model, with_liger_head(model) if system.has_liger_head else loss


def with_liger_head(model: nn.Module) -> Loss:
    """The loss of a transformers model through Liger's kernel, which never holds all logits; the rest compiled."""
    head = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    weight_VH, decoder = model.get_parameter("lm_head.weight"), torch.compile(model.get_submodule("model"))

    def loss(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        hidden_BSH = decoder(input_ids=tokens_BS).last_hidden_state
        return cast(Tensor, head(weight_VH, hidden_BSH.flatten(0, 1), targets_BS.flatten()))

    return loss


def build_torchtitan(system: System, device: torch.device, given_experts: list[Tensor]) -> tuple[nn.Module, Loss]:
    """Qwen3Model with a MoE in every layer, each block and the loss compiled."""
    arguments = importlib.import_module("torchtitan.models.qwen3.model.args")
    moe = importlib.import_module("torchtitan.models.moe")
    sizes = system.config.model
    model_arguments = arguments.Qwen3ModelArgs(
        dim=sizes.hidden_size,
        n_layers=sizes.num_hidden_layers,
        n_heads=sizes.num_attention_heads,
        n_kv_heads=sizes.num_key_value_heads,
        vocab_size=sizes.vocab_size,
        head_dim=sizes.head_dim,
        max_seq_len=system.config.data.sequence_length,
        norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        enable_weight_tying=sizes.tie_word_embeddings,
        moe_enabled=True,
        moe_inter_dim=sizes.moe_intermediate_size,
        moe_args=moe.MoEArgs(
            num_experts=sizes.n_routed_experts,
            num_shared_experts=sizes.n_shared_experts,
            top_k=sizes.num_experts_per_tok,
            score_func="sigmoid",
            route_norm=sizes.norm_topk_prob,
            route_scale=sizes.routed_scaling_factor,
            score_before_experts=False,
        ),
    )
    model = importlib.import_module("torchtitan.models.qwen3.model.model").Qwen3Model(model_arguments).to(device)
    with torch.no_grad():
        model.init_weights(device)
    if not system.has_float32_weights:
        model = model.bfloat16()
        model.rope_cache = model._precompute_rope_cache().to(device)  # its angles stay in float32
    for layer, experts_TK in zip(model.layers.values(), given_experts, strict=False):
        layer.moe.router = GivenTorchtitanRouter(layer.moe.router, experts_TK.to(device))
    cross_entropy = mean_cross_entropy
    if system.is_compiled:
        torch._dynamo.config.capture_scalar_outputs = True  # as its own apply_compile sets it
        for name, layer in model.layers.items():
            model.layers[name] = torch.compile(layer)
        cross_entropy = torch.compile(mean_cross_entropy)

    def loss(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        # Its trainer computes so on one device: autocast over float32 weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=system.has_float32_weights):
            return cross_entropy(model(tokens_BS), targets_BS)

    return model, loss


def mean_cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
