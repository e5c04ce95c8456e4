"""What a model costs: parameters and floating-point operations, from its configuration alone (no torch)."""

from typing import NamedTuple

from p828.config import ModelConfig, rounded_vocabulary


class Parameters(NamedTuple):
    total: int
    """All parameters."""
    active: int
    """Those a token uses: all but the routed experts that it is not sent to."""


class Parts(NamedTuple):
    """A number for each part of a model, all of its layers together: parameters or floating-point operations.

    Whole numbers, unless operations are asked for a fraction of a token.
    """

    embedding: float
    attention: float
    """Projections, and what is small beside them: sinks and the norms of queries and keys."""
    router: float
    routed_experts: float
    shared_experts: float
    norms: float
    """The layers' and the last one."""
    head: float
    """The output head; no parameters where it is tied to the embedding."""


def parameters_by_part(model: ModelConfig) -> Parts:
    """All parameters of the whole model."""
    layers, hidden = model.num_hidden_layers, model.hidden_size
    extras = model.num_attention_heads * model.attention_sinks + 2 * model.head_dim * model.use_qk_norm
    return Parts(
        embedding=model.vocab_size * hidden,
        attention=layers * (_projections(model) + extras),
        router=layers * hidden * model.n_routed_experts,
        routed_experts=layers * model.n_routed_experts * _expert(model),
        shared_experts=layers * model.n_shared_experts * _expert(model),
        norms=(2 * layers + 1) * hidden,
        head=0 if model.tie_word_embeddings else model.vocab_size * hidden,
    )


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the whole model and those active for one token, embedding and output head counted in both."""
    parts = parameters_by_part(model)
    unused = model.num_hidden_layers * (model.n_routed_experts - model.num_experts_per_tok) * _expert(model)
    total = int(sum(parts))
    return Parameters(total, total - unused)


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

    The sum of `flops_by_part`. A whole number for whole numbers.
    """
    return sum(flops_by_part(model, tokens, attended_pairs))


def flops_by_part(model: ModelConfig, tokens: float, attended_pairs: float) -> Parts:
    """Floating-point operations of each part to train on this number of tokens.

    A product costs 2 operations per weight forward and 4 backward. Attention costs as much as the mask leaves: scores
    and weighted values of `attended_pairs`, queries with a key that they see, L (L + 1) / 2 in a document of L tokens.
    The embedding is a look-up. Norms, softmax and recomputation are not counted, as is usual for MFU (PaLM, arXiv
    2204.02311, appendix B).
    """
    layers, hidden = model.num_hidden_layers, model.hidden_size
    scores = attended_pairs * 2 * model.num_attention_heads * model.head_dim
    return Parts(
        embedding=0,
        attention=6 * layers * (tokens * _projections(model) + scores),
        router=6 * layers * tokens * hidden * model.n_routed_experts,
        routed_experts=6 * layers * tokens * model.num_experts_per_tok * _expert(model),
        shared_experts=6 * layers * tokens * model.n_shared_experts * _expert(model),
        norms=0,
        head=6 * tokens * hidden * model.vocab_size,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """`training_flops` of a token in rows that are one document each: causal attention reads half of it on average."""
    return int(training_flops(model, 2, sequence_length)) // 2  # of two, as half a pair is no whole number


def _projections(model: ModelConfig) -> int:
    """Weights of a layer's query, key, value and output projections."""
    heads = model.num_attention_heads + model.num_key_value_heads
    return 2 * model.hidden_size * heads * model.head_dim


def projected_width(hidden_act: str, inner: int) -> int:
    """Width P of gate_proj and up_proj for an inner width I."""
    return 2 * inner if hidden_act == "swiglu_of_product" else inner


def _expert(model: ModelConfig) -> int:
    inner = model.moe_intermediate_size
    return (2 * projected_width(model.hidden_act, inner) + inner) * model.hidden_size
