"""p828's Mixture-of-Experts transformer for transformers 5.16 and later, and for vLLM's Transformers backend.

vLLM reads this source to replace its parts by faster ones. It relies on: one call of an attention interface, with
`scaling=self.scaling` and `s_aux=self.sinks`; a router of `weight` and `e_score_correction_bias` alone that takes the
top k of scores of one linear layer; experts as packed 3-D parameters, called with (hidden_states, top_k_index,
top_k_weights); shared experts that are added; act(gate(x)) * up(x) in one line.
"""

from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_p828 import P828RotaryEmbedding, apply_rotary, eager_attention_forward, usable_cache, with_sinks
from .configuration_p828 import P828Config


class P828RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class P828Attention(nn.Module):
    def __init__(self, config: P828Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.use_qk_norm = config.use_qk_norm
        if self.use_qk_norm:
            self.q_norm = P828RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = P828RMSNorm(config.head_dim, config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape)
        key = self.k_proj(hidden_states).view(hidden_shape)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        query = apply_rotary(query.transpose(1, 2), cos, sin)
        key = apply_rotary(key.transpose(1, 2), cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if self.sinks is not None:
            attention_interface = with_sinks(implementation, attention_interface)
        attn_output, attn_weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, s_aux=self.sinks, **kwargs
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class P828TopkRouter(nn.Module):
    """Chooses by score plus bias, weighs by the score; in float32. Returns logits, weights and indices."""

    e_score_correction_bias: Tensor

    def __init__(self, config: P828Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        hidden_states = hidden_states.view(-1, config.hidden_size)
        logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
        scores = logits.softmax(dim=-1) if config.scoring_func == "softmax" else logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if config.n_group > 1:  # a group is as good as its two best experts
            grouped = choice.view(-1, config.n_group, config.n_routed_experts // config.n_group)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1).indices
            is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice = grouped.masked_fill(~is_kept[..., None], float("-inf")).flatten(1)
        indices = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return logits, weights * config.routed_scaling_factor, indices


def swiglu_of_product(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = (gate * up).chunk(2, dim=-1)
    return F.silu(gate) * up


@use_experts_implementation
class P828Experts(nn.Module):
    """The routed experts; `gate_up_proj` holds an expert's gate projection above its up projection."""

    def __init__(self, config: P828Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.is_of_product = config.hidden_act == "swiglu_of_product"
        inner = config.moe_intermediate_size
        projected = 2 * inner if self.is_of_product else inner
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * projected, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, inner))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return swiglu_of_product(gate, up) if self.is_of_product else F.silu(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index[top_k_index < self.num_experts].unique():  # others are another rank's
            token, position = torch.where(top_k_index == expert)
            inner = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            weighted = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, position, None]
            total.index_add_(0, token, weighted.to(total.dtype))
        return total


class P828MLP(nn.Module):
    """The shared experts, as one of their joint width."""

    def __init__(self, config: P828Config) -> None:
        super().__init__()
        inner = config.n_shared_experts * config.moe_intermediate_size
        projected = 2 * inner if config.hidden_act == "swiglu_of_product" else inner
        self.gate_proj = nn.Linear(config.hidden_size, projected, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, projected, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class P828MLPOfProduct(P828MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(swiglu_of_product(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class P828MoE(nn.Module):
    def __init__(self, config: P828Config) -> None:
        super().__init__()
        mlp = P828MLPOfProduct if config.hidden_act == "swiglu_of_product" else P828MLP
        self.gate = P828TopkRouter(config)
        self.experts = P828Experts(config)
        self.shared_experts = mlp(config) if config.n_shared_experts else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        mixed = self.experts(tokens, top_k_index, top_k_weights).view(hidden_states.shape)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(hidden_states)
        return mixed


class P828DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: P828Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = P828Attention(config, layer_idx)
        self.mlp = P828MoE(config)
        self.input_layernorm = P828RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = P828RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class P828PreTrainedModel(PreTrainedModel):
    config: P828Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["P828DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": P828DecoderLayer,
        "attentions": P828Attention,
        "router_logits": OutputRecorder(P828TopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["mlp.gate.weight", "e_score_correction_bias", "sinks"]

    @property
    def _supports_flash_attn(self) -> bool:
        return not self.config.attention_sinks

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, P828TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, P828Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, P828Attention) and module.sinks is not None:
            init.zeros_(module.sinks)


def refuse_what_vllm_changes(config: P828Config) -> None:
    """vLLM's backend computes silu(gate) * up whatever the experts say, and knows sinks since 0.30."""
    if config.hidden_act != "swiglu":
        raise ValueError(f"vLLM would run this model's experts as 'swiglu', not as hidden_act = {config.hidden_act!r}")
    installed = version("vllm")
    if config.attention_sinks and Version(installed) < Version("0.30"):
        raise ValueError(f"vLLM {installed} would leave out this model's attention sinks; 0.30 and later apply them")


class P828Model(P828PreTrainedModel):
    def __init__(self, config: P828Config) -> None:
        super().__init__(config)
        if config._attn_implementation == "vllm":
            refuse_what_vllm_changes(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(P828DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = P828RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = P828RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """`cache` is the name that `past_key_values` has from transformers 5.24 on."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = usable_cache(self.config, past_key_values if cache is None else cache)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache = None  # a layer that runs twice would append its keys twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        position_embeddings = self.rotary_emb(position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(self.norm(hidden_states), cache)


class P828ForCausalLM(P828PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: P828Config) -> None:
        super().__init__(config)
        self.model = P828Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        usable_cache(self.config, kwargs.get("cache", kwargs.get("past_key_values")))
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        # by position, since the name of the cache depends on transformers' version
        caches = outputs.past_key_values
        return MoeCausalLMOutputWithPast(
            loss, None, logits, caches, outputs.hidden_states, outputs.attentions, outputs.router_logits
        )


__all__ = ["P828ForCausalLM", "P828Model", "P828PreTrainedModel"]
