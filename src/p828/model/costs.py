"""What a model costs: parameters and floating-point operations, from its configuration alone (no torch)."""

from typing import NamedTuple

from p828.config import ModelConfig, rounded_vocabulary


class Parameters(NamedTuple):
    total: int
    """All parameters."""
    active: int
    """Those a token uses: all but the routed experts that it is not sent to."""


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the whole model and those active for one token, embedding and output head counted in both."""
    heads = model.num_attention_heads + model.num_key_value_heads
    attention = 2 * model.hidden_size * heads * model.head_dim
    attention += model.num_attention_heads * model.attention_sinks + 2 * model.head_dim * model.use_qk_norm
    router = model.hidden_size * model.n_routed_experts
    norms = 2 * model.hidden_size
    shared = model.n_shared_experts * _expert(model)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size

    def whole(experts: int) -> int:
        per_layer = attention + router + norms + shared + experts * _expert(model)
        return embeddings + model.num_hidden_layers * per_layer

    return Parameters(whole(model.n_routed_experts), whole(model.num_experts_per_tok))


def unused_vocabulary(model: ModelConfig, vocab_size: int) -> str:
    """A line on the parameters of rows that no token uses, where they are a tenth more than a tokenizer needs."""
    if model.vocab_size <= 1.1 * rounded_vocabulary(vocab_size):
        return ""
    rows = (model.vocab_size - vocab_size) * (1 if model.tie_word_embeddings else 2)
    share = rows * model.hidden_size / count_parameters(model).total
    return (
        f"model.vocab_size = {model.vocab_size}: the tokenizer has {vocab_size:,} tokens, so that {share:.0%} of the "
        "parameters are never used; model.vocab_size = 0 follows the tokenizer"
    )


def training_flops(model: ModelConfig, tokens: float, attended_pairs: float) -> float:
    """Floating-point operations to train on this number of tokens: forward and backward of every matrix product.

    A product costs 2 operations per weight forward and 4 backward. Attention costs as much as the mask leaves: scores
    and weighted values of `attended_pairs`, queries with a key that they see, L (L + 1) / 2 in a document of L tokens.
    The embedding is a look-up. Norms, softmax and recomputation are not counted, as is usual for MFU (PaLM, arXiv
    2204.02311, appendix B). A whole number for whole numbers.
    """
    heads = model.num_attention_heads + model.num_key_value_heads
    projections = 2 * model.hidden_size * heads * model.head_dim
    experts = (model.num_experts_per_tok + model.n_shared_experts) * _expert(model)
    router = model.hidden_size * model.n_routed_experts
    attention = 2 * model.num_attention_heads * model.head_dim
    head = model.vocab_size * model.hidden_size
    layers = model.num_hidden_layers
    return 6 * (tokens * (layers * (projections + experts + router) + head) + attended_pairs * layers * attention)


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """`training_flops` of a token in rows that are one document each: causal attention reads half of it on average."""
    return int(training_flops(model, 2, sequence_length)) // 2  # of two, as half a pair is no whole number


def _expert(model: ModelConfig) -> int:
    projected = 2 if model.hidden_act == "swiglu_of_product" else 1
    return (2 * projected + 1) * model.hidden_size * model.moe_intermediate_size
