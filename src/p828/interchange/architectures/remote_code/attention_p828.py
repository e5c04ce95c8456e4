"""Rotary positions, and attention with sinks: a learned logit a head in the softmax's denominator, `s_aux` (heads,).

In attention, queries are (batch, heads, length, head_dim), keys and values (batch, key heads, keys, head_dim), outputs
(batch, length, heads, head_dim), as transformers' attention functions have it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_p828 import P828Config


class P828RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles, in float32: (batch, length, head_dim / 2) each."""

    inv_freq: Tensor

    def __init__(self, config: P828Config) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        is_default = self.rope_type == "default"
        compute = self.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, attention_scaling = compute(config)
        self.attention_scaling: float = attention_scaling
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: P828Config, device: Any = None, **kwargs: Any) -> tuple[Tensor, float]:
        pair = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / config.rope_parameters["rope_theta"] ** (pair / config.head_dim), 1.0

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of (batch, heads, length, head_dim), in float32."""
    first, second = states.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax([q kᵀ scaling, sink]) v without the sink's column; the softmax in float32."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_attention_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The sink as one more key that every query sees, whose value is zero.

    Its score comes from another dimension of the heads: there the query holds its head's sink, that key 1 and all
    others 0. Seven more dimensions of zeros follow, since fused kernels want a multiple of eight.
    """
    batch, _, length, head_dim = query.shape
    if attention_mask is None:  # plainly causal, or a single query that sees all keys
        visible = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = (visible.tril() if length > 1 else visible)[None, None]
    attention_mask = F.pad(attention_mask, (0, 1), value=True if attention_mask.dtype == torch.bool else 0.0)
    sinks = (s_aux / scaling).to(query.dtype).view(1, -1, 1, 1).expand(batch, -1, length, 1)
    query = F.pad(torch.cat((query, sinks), dim=-1), (0, 7))
    sink_key = (torch.arange(head_dim + 8, device=key.device) == head_dim).to(key.dtype)
    key = torch.cat((F.pad(key, (0, 8)), sink_key.expand(*key.shape[:2], 1, -1)), dim=2)
    value = F.pad(value, (0, 8, 0, 1))
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attended[..., :head_dim], None


def flex_attention_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    s_aux: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention without sinks times exp(lse) / (exp(lse) + exp(sink)); `attention_mask` is a BlockMask.

    The compiled kernel for CPUs gives no log-sum-exp, so there the plain function runs.
    """
    from torch.nn.attention.flex_attention import flex_attention

    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    arguments = {"block_mask": attention_mask, "scale": scaling, **get_flex_attention_lse_kwargs(True)}
    if query.device.type == "cpu":
        attended, aux = flex_attention(query, key, value, **arguments)
    else:
        attended, aux = compile_friendly_flex_attention(query, key, value, training=module.training, **arguments)
    lse = getattr(aux, "lse", aux)
    fraction = torch.sigmoid(lse.float() - s_aux.float()[:, None])
    return (attended * fraction[..., None]).to(query.dtype).transpose(1, 2).contiguous(), None


def with_sinks(implementation: str, interface: Callable[..., Any]) -> Callable[..., Any]:
    """The function that applies `s_aux`; others would leave the sinks out in silence."""
    if implementation in ("eager", "vllm"):
        return interface
    own = {"sdpa": sdpa_attention_with_sinks, "flex_attention": flex_attention_with_sinks}
    if implementation not in own:
        raise ValueError(
            f"attn_implementation = {implementation!r} does not apply this model's attention sinks; "
            "'eager', 'sdpa' and 'flex_attention' do"
        )
    return own[implementation]


def usable_cache(config: P828Config, cache: Any) -> Cache | None:
    """The same; an error for a cache with which attention would be wrong."""
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError("this model has no continuous batching, and no caches but transformers' `Cache`")
    if config._attn_implementation == "flex_attention" and getattr(cache, "is_compileable", False):
        # transformers' mask reads the cache's length when attention runs, and the cache has grown by then
        raise ValueError("attn_implementation = 'flex_attention' is wrong with a static cache; 'sdpa' is right")
    return cache
