"""Attention with sinks for p828's model: a learned logit a head in the softmax's denominator, `s_aux` (heads,).

Queries are (batch, heads, length, head_dim), keys and values (batch, key heads, keys, head_dim), outputs
(batch, length, heads, head_dim), as transformers' attention functions have it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


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


def with_sinks(implementation: str, interface: Callable[..., Any], is_paged: bool) -> Callable[..., Any]:
    """The function that applies `s_aux`; others would leave the sinks out in silence.

    `is_paged`: keys and values are to be taken from a paged cache, as in transformers' continuous batching.
    """
    if is_paged:
        raise ValueError("this model's attention sinks are not applied in continuous batching; `generate` applies them")
    if implementation in ("eager", "vllm"):
        return interface
    own = {"sdpa": sdpa_attention_with_sinks, "flex_attention": flex_attention_with_sinks}
    if implementation not in own:
        raise ValueError(
            f"attn_implementation = {implementation!r} does not apply this model's attention sinks; "
            "'eager', 'sdpa' and 'flex_attention' do"
        )
    return own[implementation]
