"""What a step must read from memory, from the configuration alone: the bound on tokens a second."""

from p828.config import ModelConfig
from p828.model.costs import parameters_by_part


def expected_experts(model: ModelConfig, batch: int) -> float:
    """Different routed experts of a layer that a step of `batch` tokens goes through, if routing is even.

    E (1 - (1 - K/E)^B): each token leaves a given expert out with probability 1 - K/E.
    """
    experts = model.n_routed_experts
    return experts * (1 - (1 - model.num_experts_per_tok / experts) ** batch)


def step_bytes(model: ModelConfig, batch: int, cached_tokens: float, itemsize: int) -> float:
    """Bytes of weights and of keys and values that a step of `batch` sequences reads, each number once.

    `cached_tokens` are those of one sequence. Every number takes `itemsize` bytes but for the router, the norms and
    the sinks, which are float32. Of the embedding a row is read for each sequence.
    """
    parts, layers = parameters_by_part(model), model.num_hidden_layers
    small = layers * (model.num_attention_heads * model.attention_sinks + 2 * model.head_dim * model.use_qk_norm)
    in_float32 = parts.router + parts.norms + small
    head = parts.head or parts.embedding
    routed = parts.routed_experts * expected_experts(model, batch) / model.n_routed_experts
    weights = parts.attention - small + routed + parts.shared_experts + head + batch * model.hidden_size
    cache = batch * cached_tokens * layers * 2 * model.num_key_value_heads * model.head_dim
    return 4 * in_float32 + itemsize * (weights + cache)
