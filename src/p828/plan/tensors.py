"""Every parameter of a model with its shape, without making one."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from p828.config import ModelConfig
from p828.model.costs import projected_width

EMBEDDING = "model.embed_tokens.weight"


class ParameterShape(NamedTuple):
    name: str
    """As the model's `named_parameters` have it."""
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """As `model.precision.is_matrix`: stored in the dtype that layers compute in."""
        return len(self.shape) > 1 and not self.name.endswith(".gate.weight")

    def decays(self, decay_embeddings: bool) -> bool:
        """As `optim.groups`: whether it is under weight decay."""
        return len(self.shape) > 1 and (decay_embeddings or self.name != EMBEDDING)


def parameter_shapes(model: ModelConfig) -> list[ParameterShape]:
    """All parameters, in the model's order."""
    hidden, vocabulary = model.hidden_size, model.vocab_size
    found = [ParameterShape(EMBEDDING, (vocabulary, hidden))]
    for layer in range(model.num_hidden_layers):
        found += (ParameterShape(f"model.layers.{layer}.{name}", shape) for name, shape in _layer(model))
    found.append(ParameterShape("model.norm.weight", (hidden,)))
    if not model.tie_word_embeddings:
        found.append(ParameterShape("lm_head.weight", (vocabulary, hidden)))
    return found


def layer_shapes(model: ModelConfig) -> list[ParameterShape]:
    """The parameters of one layer; all layers have the same."""
    return [ParameterShape(name, shape) for name, shape in _layer(model)]


def _layer(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head, experts = model.hidden_size, model.head_dim, model.n_routed_experts
    inner = model.moe_intermediate_size
    projected = projected_width(model.hidden_act, inner)
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    yield "input_layernorm.weight", (hidden,)
    if model.attention_sinks:
        yield "self_attn.sinks", (model.num_attention_heads,)
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if model.use_qk_norm:
        yield "self_attn.q_norm.weight", (head,)
        yield "self_attn.k_norm.weight", (head,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate.weight", (experts, hidden)
    yield "mlp.experts.gate_up_proj", (experts, 2 * projected, hidden)
    yield "mlp.experts.down_proj", (experts, hidden, inner)
    if model.n_shared_experts:
        yield "mlp.shared_experts.gate_proj.weight", (model.n_shared_experts * projected, hidden)
        yield "mlp.shared_experts.up_proj.weight", (model.n_shared_experts * projected, hidden)
        yield "mlp.shared_experts.down_proj.weight", (hidden, model.n_shared_experts * inner)
