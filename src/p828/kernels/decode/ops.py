"""A decoding step's operations in Triton, on CUDA: T tokens, each the newest of its sequence.

A layer is four calls: `norm_linear` (queries, keys and values), `attention`, `route` and `experts`, whose parts the
next layer's `norm_linear` sums. All of them can be captured in a CUDA graph: sizes come from the shapes, and whatever
changes from step to step (tokens, positions, slots) is read from tensors on the device.
The plain twins are in `tests/decode_twins.py`. Shapes as in `p828.model`, and

    J  the experts of a token: its K routed ones and the shared ones
    S  slots of the cache; for weights, the shared experts
    X  a width that the text names

Tensors are contiguous. Weights of products and activations are of one dtype (bfloat16; the kernels take any floating
dtype); norms, router and sinks are float32.
"""

import torch
from torch import Tensor

FEW_TOKENS = 4  # with other kernels for attention


def add_norm(x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + Σ_j parts[:, j], and its RMSNorm: both (T, H) in x's dtype. Without parts the first is x itself.

    The sum is in float32 and in the order of j, and is rounded to x's dtype before it is normalised.
    """
    from p828.kernels.decode import residual_triton

    return residual_triton.add_norm(x_TH, parts_TJH, norm_weight_H, eps)


def linear(x_TH: Tensor, weight_VH: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x weightᵀ, summed in float32: (T, V) in `out_dtype`."""
    from p828.kernels.decode import linear_triton

    return linear_triton.linear(x_TH, weight_VH, out_dtype)


def norm_linear(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, weight_VH: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`linear` of the second result of `add_norm`, (T, V) in `out_dtype`, and the first result of `add_norm`."""
    from p828.kernels.decode import linear_triton

    return linear_triton.norm_linear(x_TH, parts_TJH, norm_weight_H, eps, weight_VH, out_dtype)


def embed_norm_linear(
    embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor, norm_weight_H: Tensor, eps: float, weight_XH: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_linear` of the embeddings of the slots' newest tokens, in their dtype, and these (T, H)."""
    from p828.kernels.decode import linear_triton

    return linear_triton.embed_norm_linear(embedding_VH, slots_T, token_S, norm_weight_H, eps, weight_XH)


def logits(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, head_VH: Tensor, slots_T: Tensor,
    position_S: Tensor,
) -> Tensor:  # fmt: skip
    """The first result of `norm_linear` with the head's weight, (T, V) in float32.

    The head of one token is read in turns from its first and its last row, by `position_S[slots_T[0]]`: so a small
    model's step finds in the L2 cache what the last one read last.
    """
    from p828.kernels.decode import linear_triton

    return linear_triton.logits(x_TH, parts_TJH, norm_weight_H, eps, head_VH, slots_T, position_S)


def attention(
    qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, slots_T: Tensor, position_S: Tensor,
    frequencies: Tensor, factor: float, q_norm_D: Tensor | None, k_norm_D: Tensor | None, sinks_N: Tensor | None,
    eps: float, arrivals_TG: Tensor | None, o_proj_HX: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of T new tokens over their slots' cache, which gets their keys and values: parts (T, G or 1, H).

    `qkv_TXD` holds N query heads, G key heads and G value heads. Queries and keys are normalised (RMSNorm with the
    float32 weights and `eps`; None: not), rotated by the token's position times the float32 `frequencies` (D / 2),
    cosine and sine times `factor`. Token t's position is `position_S[slots_T[t]]`; its key and value are written at
    this place of the slot, and it sees the places up to its own; `sinks_N` (float32 or None) are logits in the
    softmax's denominator. A token with a negative slot is padding: its result is 0 and it writes nothing. No two tokens
    that are read later have one slot.
    What the heads give, rounded to qkv's dtype, goes through `o_proj_HX` (X = N · D).

    `arrivals_TG`: int32 zeros for at least T tokens, which the kernel counts in and leaves zero; one for all layers.
    Slots, positions and the cache must be older than the step, see `dependent_launch_triton`.
    """
    from p828.kernels.decode import attention_triton, split_attention_triton

    attended = qkv_TXD, keys_SGCD, values_SGCD, slots_T, position_S, frequencies, factor
    norms_and_sinks = q_norm_D, k_norm_D, sinks_N, eps
    groups, head_dim = keys_SGCD.shape[1], keys_SGCD.shape[3]
    sharing = qkv_TXD.shape[1] // groups - 2
    if len(qkv_TXD) <= FEW_TOKENS and split_attention_triton.takes(sharing, head_dim):
        return split_attention_triton.attention(*attended, *norms_and_sinks, o_proj_HX)
    assert arrivals_TG is not None
    attended_TX = attention_triton.attention(*attended, *norms_and_sinks, arrivals_TG)
    return linear(attended_TX, o_proj_HX, qkv_TXD.dtype)[:, None]


def route(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, router_weight_EH: Tensor,
    bias_E: Tensor, per_token: int, shared: int, scoring_func: str, n_group: int, topk_group: int,
    norm_topk_prob: bool, routed_scaling_factor: float, arrivals_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`add_norm`'s two results, and the experts of every token: ids (T, J) int32, weights (T, J) float32.

    The choice is that of `p828.model.router`, best first and of equal scores the lower id. The last `shared` columns
    are the shared experts: ids E, E + 1, …, with weight 1. `arrivals_T`: as for `attention`.
    """
    from p828.kernels.decode import route_triton

    return route_triton.route(
        x_TH, parts_TJH, norm_weight_H, eps, router_weight_EH, bias_E, per_token, shared, scoring_func, n_group,
        topk_group, norm_topk_prob, routed_scaling_factor, arrivals_T,
    )  # fmt: skip


def experts(
    x_TH: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, gate_up_EXH: Tensor, down_EHI: Tensor,
    shared_gate_up_SXH: Tensor | None, shared_down_SHI: Tensor | None, hidden_act: str,
) -> Tensor:  # fmt: skip
    """weight · down(act(gate x, up x)) of every chosen expert: parts (T, J or 1, H), float32, of which the sum counts.

    `gate_up_EXH` (E, 2 P, H) has the gate's rows first, as `down_EHI` for the routed experts; the other two are the
    same for the shared ones, all of width I: a shared expert of width n I is n of them, its rows and columns cut. An id
    from E on is theirs, in the last columns of `experts_TJ` as `route` gives them. No id twice in a row of
    `experts_TJ`. `hidden_act`: as for `p828.model.experts.activate`.
    """
    from p828.kernels.decode import experts_triton

    return experts_triton.experts(
        x_TH, experts_TJ, weights_TJ, gate_up_EXH, down_EHI, shared_gate_up_SXH, shared_down_SHI, hidden_act
    )


def embed(embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor) -> Tensor:
    """The embeddings (T, H) of the slots' newest tokens `token_S`."""
    from p828.kernels.decode import tokens_triton

    return tokens_triton.embed(embedding_VH, slots_T, token_S)


def choose_tokens(
    logits_TV: Tensor, slots_T: Tensor, temperature_S: Tensor, uniform_SC: Tensor, token_S: Tensor, position_S: Tensor,
    told_SC: Tensor, arrivals_T: Tensor,
) -> Tensor:  # fmt: skip
    """The next token of each row, int64 (T,), without filters or penalties; −1 where a logit is no finite number.

    `logits_TV` is float32. A slot with temperature 0 takes its likeliest token, of equal ones the lowest. Another draws
    as `p828.inference.sampling.draw` does, by `uniform_SC` (float32) at the next position, which C limits. `token_S`
    and `position_S` (int64) get the next token, 0 for −1, and its position; `told_SC` (int32, which may be pinned
    memory of the host) gets the result at this position. `arrivals_T`: as for `attention`.
    """
    from p828.kernels.decode import tokens_triton

    return tokens_triton.choose_tokens(
        logits_TV, slots_T, temperature_S, uniform_SC, token_S, position_S, told_SC, arrivals_T
    )
