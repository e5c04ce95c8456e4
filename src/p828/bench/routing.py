"""Routings that do not depend on the model: the experts are given, the weights still come from the router."""

from typing import Any

import torch
from torch import Tensor, nn

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


class GivenTransformersExperts(nn.Module):
    """transformers' experts, called with other experts than its router chose."""

    experts_TK: Tensor

    def __init__(self, experts: nn.Module, experts_TK: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("experts_TK", experts_TK, persistent=False)

    def forward(self, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts(x_TH, self.experts_TK, weights_TK)


class GivenTorchtitanRouter(nn.Module):
    """torchtitan's router with its choice replaced; also returns the loads, as that one does."""

    experts_TK: Tensor

    def __init__(self, router: Any, experts_TK: Tensor) -> None:
        super().__init__()
        self.router = router
        self.top_k: int = router.top_k
        self.num_experts: int = router.num_experts
        self.register_buffer("experts_TK", experts_TK, persistent=False)

    def forward(self, x_TH: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        weights_TK, _, _ = self.router(x_TH, bias_E)
        loads_E = torch.histc(self.experts_TK.view(-1), bins=self.num_experts, min=0, max=self.num_experts)
        return weights_TK, self.experts_TK, loads_E
