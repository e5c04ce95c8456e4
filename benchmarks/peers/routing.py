"""The peers' routers and experts with the choice of experts given from outside."""

from typing import Any

from torch import Tensor, nn


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
    """torchtitan's router with its choice replaced; the weights are its own scores of the given experts."""

    experts_TK: Tensor

    def __init__(self, router: Any, experts_TK: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("experts_TK", experts_TK, persistent=False)

    def forward(self, x_BLH: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        _, _, scores_BLE = self.router(x_BLH, bias_E)
        experts_BLK = self.experts_TK.view(*x_BLH.shape[:2], -1)
        weights_BLK = scores_BLE.gather(-1, experts_BLK)
        if self.router.route_norm:
            weights_BLK = weights_BLK / (weights_BLK.sum(-1, keepdim=True) + 1e-20)
        return weights_BLK * self.router.route_scale, experts_BLK, scores_BLE
