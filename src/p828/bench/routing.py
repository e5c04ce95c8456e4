"""Routings that do not depend on the model: the experts are given, the weights still come from the router."""

import torch
from torch import Tensor

from p828.model.router import Router, Routing


def random_experts(tokens: int, experts: int, per_token: int, generator: torch.Generator) -> Tensor:
    """int64 (T, K): each token's experts drawn evenly, none twice."""
    return torch.rand(tokens, experts, generator=generator).topk(per_token, dim=-1).indices


def balanced_experts(tokens: int, experts: int, per_token: int, generator: torch.Generator) -> Tensor:
    """int64 (T, K): loads that differ by one token at most, no expert twice for a token, tokens in random order."""
    in_turn_TK = (torch.arange(tokens * per_token) % experts).view(tokens, per_token)
    return in_turn_TK[torch.randperm(tokens, generator=generator)]


class GivenRouter(Router):
    """p828's router with its choice replaced; shares the weights of the router it stands in for."""

    experts_TK: Tensor

    def __init__(self, router: Router, experts_TK: Tensor) -> None:
        super().__init__(router.config)
        self.weight = router.weight
        self.e_score_correction_bias = router.e_score_correction_bias
        self.register_buffer("experts_TK", experts_TK, persistent=False)

    def forward(self, x_TH: Tensor) -> Routing:
        return super().forward(x_TH)._replace(experts_TK=self.experts_TK)
