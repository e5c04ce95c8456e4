"""The router: which experts a token goes to, and with which weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.kernels.router import choose_experts, router_logits
from p828.model.backend import router_chooses_in_triton, uses_triton

ENTROPY_TOKENS = 1024


class Routing(NamedTuple):
    experts_TK: Tensor
    """int64: the chosen experts."""
    weights_TK: Tensor
    """float32: their weights; gradients reach the router through these alone."""
    scores_TE: Tensor
    """float32: every expert's score, before bias and choice."""
    logits_TE: Tensor
    """float32: what `score` makes the scores of."""


class Router(nn.Module):
    """Scores every expert, chooses by score plus balance bias, weighs by the unbiased score. All in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TH: Tensor) -> Routing:
        if uses_triton(x_TH.device, x_TH.dtype):
            logits_TE = router_logits(x_TH, self.weight.float())
        else:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
        return routing_of(self.config, logits_TE, self.e_score_correction_bias)


def routing_of(config: ModelConfig, logits_TE: Tensor, bias_E: Tensor) -> Routing:
    """The choice that follows from a router's logits."""
    scores_TE = score(config.scoring_func, logits_TE)
    choice_TE = scores_TE.detach() + bias_E
    if config.n_group > 1:
        choice_TE = limit_groups(choice_TE, config.n_group, config.topk_group)
    if router_chooses_in_triton(logits_TE.device):
        experts_TK = choose_experts(choice_TE, config.num_experts_per_tok)
    else:
        experts_TK = choice_TE.topk(config.num_experts_per_tok, dim=-1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if config.norm_topk_prob:
        # The floor keeps a token whose chosen scores all underflow to zero from dividing by zero.
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return Routing(experts_TK, weights_TK * config.routed_scaling_factor, scores_TE, logits_TE)


def score(scoring_func: str, logits_TE: Tensor) -> Tensor:
    """Scores of at least 0, in the logits' dtype: the weights of a token's experts are parts of their sum."""
    if scoring_func == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid()


def limit_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Minus infinity for experts outside the `topk_group` groups whose two best experts sum highest."""
    grouped_TGX = choice_TE.unflatten(1, (n_group, -1))  # here G counts groups of X experts each
    group_scores_TG = grouped_TGX.topk(2, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG = kept_TG.scatter(1, group_scores_TG.topk(topk_group, dim=-1).indices, True)
    return grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)


def sequence_balance_loss(routing: Routing, sequences: int, valid_T: Tensor | None = None) -> Tensor:
    """Sum over sequences of DeepSeek-V3's sequence-wise auxiliary loss times the sequence's valid tokens: a scalar.

    The loss of a sequence (equations 17–20) is Σ_e f_e P_e. With n valid tokens, f_e is E / (K n) times the number of
    them that chose e, and P_e is the mean of their normalised scores; the loss is 1 when loads are even. The result
    divided by all valid tokens is the mean over sequences, weighted by their valid tokens. A sequence without valid
    tokens adds nothing. `valid_T` (bool) defaults to all tokens.
    """
    experts, per_token = routing.scores_TE.shape[1], routing.experts_TK.shape[1]
    share_TE = routing.scores_TE / routing.scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    chosen_TE = torch.zeros_like(routing.scores_TE).scatter(1, routing.experts_TK, 1.0)
    if valid_T is None:
        valid_T = torch.ones_like(routing.scores_TE[:, 0], dtype=torch.bool)
    share_BE, chosen_BE = (
        x_TE.where(valid_T[:, None], 0.0).view(sequences, -1, experts).sum(dim=1) for x_TE in (share_TE, chosen_TE)
    )
    valid_B1 = valid_T.view(sequences, -1).sum(dim=1, keepdim=True).clamp_min(1)
    return (chosen_BE * share_BE / valid_B1).sum() * experts / per_token


def score_entropy(routing: Routing, valid_T: Tensor | None = None) -> Tensor:
    """Σ over valid tokens of the entropy of their normalised scores, over its greatest value ln E: a scalar.

    1 a token if a router does not tell the experts apart, 0 if it sees a single one. `valid_T` (bool) defaults to all.
    Of more than ENTROPY_TOKENS tokens it is that of as many, evenly spaced, times what they stand for. It has no
    gradient.
    """
    every = max(len(routing.scores_TE) // ENTROPY_TOKENS, 1)
    scores_SE = routing.scores_TE.detach()[::every]  # S counts the tokens that are looked at
    share_SE = scores_SE / scores_SE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    entropy_S = torch.special.entr(share_SE).sum(dim=-1)
    if valid_T is not None:
        entropy_S = entropy_S.where(valid_T[::every], 0.0)
    stand_for = len(routing.scores_TE) / len(scores_SE)
    return entropy_S.sum() * (stand_for / max(math.log(scores_SE.shape[1]), 1e-20))


def z_loss(routing: Routing, valid_T: Tensor | None = None) -> Tensor:
    """Σ logsumexp(logits)² over valid tokens, which keeps router logits small (ST-MoE, arXiv 2202.08906, equation 5).

    `valid_T` (bool) defaults to all.
    """
    squares_T = routing.logits_TE.logsumexp(dim=-1).square()
    return (squares_T if valid_T is None else squares_T.where(valid_T, 0.0)).sum()
