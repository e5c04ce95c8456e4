"""The mixture of experts: route, sort tokens by expert, compute each expert's rows, bring them back weighted.

No token is dropped and no row is padded; an expert without tokens is a normal case.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.kernels.grouped_linear import grouped_linear
from p828.model.linear import Linear
from p828.model.router import Routing


class Order(NamedTuple):
    """The permutation that sorts the R = T·K routed tokens by expert."""

    sorted_R: Tensor
    """int64: sorted row r is entry sorted_R[r] of the flattened (T, K)."""
    inverse_R: Tensor
    """int64: entry i of the flattened (T, K) is sorted row inverse_R[i]."""
    loads_E: Tensor
    """int64: rows of each expert."""


class Experts(nn.Module):
    """W2(dropout(act(W1 x, W3 x))) for every routed expert, as three stacked tensors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_act, self.dropout = config.hidden_act, config.dropout
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        projected = projected_width(config.hidden_act, inner)
        self.gate_proj = nn.Parameter(torch.empty(experts, projected, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, projected, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts_TK, self.gate_proj.shape[0])
        x_RH = Dispatch.apply(x_TH, order.sorted_R, order.inverse_R)
        gate_RP = grouped_linear(x_RH, self.gate_proj.to(x_TH.dtype), order.loads_E)
        up_RP = grouped_linear(x_RH, self.up_proj.to(x_TH.dtype), order.loads_E)
        inner_RI = F.dropout(activate(self.hidden_act, gate_RP, up_RP), self.dropout, self.training)
        y_RH = grouped_linear(inner_RI, self.down_proj.to(x_TH.dtype), order.loads_E)
        return Combine.apply(y_RH, routing.weights_TK, order.sorted_R, order.inverse_R)


class SharedExperts(nn.Module):
    """The same form for every token: `n_shared_experts` experts as one of their joint width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_act, self.dropout = config.hidden_act, config.dropout
        inner = config.n_shared_experts * config.moe_intermediate_size
        projected = projected_width(config.hidden_act, inner)
        self.gate_proj = Linear(config.hidden_size, projected)
        self.up_proj = Linear(config.hidden_size, projected)
        self.down_proj = Linear(inner, config.hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        inner_TI = activate(self.hidden_act, self.gate_proj(x_TH), self.up_proj(x_TH))
        return self.down_proj(F.dropout(inner_TI, self.dropout, self.training))


def projected_width(hidden_act: str, inner: int) -> int:
    """Width P of gate_proj and up_proj for an inner width I."""
    return 2 * inner if hidden_act == "swiglu_of_product" else inner


def activate(hidden_act: str, gate_P: Tensor, up_P: Tensor) -> Tensor:
    """`swiglu`: silu(gate) ⊙ up, P = I. `swiglu_of_product`: SwiGLU over the two halves of gate ⊙ up, P = 2 I."""
    if hidden_act == "swiglu_of_product":
        gate_P, up_P = (gate_P * up_P).chunk(2, dim=-1)
    return F.silu(gate_P) * up_P


def sort_by_expert(experts_TK: Tensor, n_routed_experts: int) -> Order:
    """The stable order of the routed tokens by expert: within an expert, tokens keep their order."""
    chosen_R = experts_TK.flatten()
    sorted_R = chosen_R.argsort(stable=True)
    inverse_R = torch.empty_like(sorted_R).scatter_(0, sorted_R, torch.arange(len(sorted_R), device=sorted_R.device))
    expert_E = torch.arange(n_routed_experts, device=chosen_R.device)
    return Order(sorted_R, inverse_R, (chosen_R[:, None] == expert_E).sum(dim=0))


class Dispatch(torch.autograd.Function):
    """(T, H) to (R, H): each token's row, once for every expert it goes to.

    Its own function because the backward of plain indexing adds with atomics or a sort; knowing the inverse
    permutation, the gradient is a gather and a sum over K, always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, sorted_R: Tensor, inverse_R: Tensor) -> Tensor:
        per_token = len(sorted_R) // len(x_TH)
        ctx.save_for_backward(inverse_R)
        ctx.per_token = per_token
        return x_TH[sorted_R // per_token]

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RH[inverse_R].unflatten(0, (-1, ctx.per_token)).sum(dim=1), None, None


class Combine(torch.autograd.Function):
    """(R, H) to (T, H): the weighted sum over a token's experts, Σ_k weights_TK · y."""

    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, weights_TK: Tensor, sorted_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(y_RH, weights_TK, sorted_R, inverse_R)
        y_TKH = y_RH[inverse_R].unflatten(0, weights_TK.shape)
        return (y_TKH * weights_TK[..., None]).sum(dim=1).to(y_RH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        y_RH, weights_TK, sorted_R, inverse_R = ctx.saved_tensors
        grad_sorted_RH = grad_TH[sorted_R // weights_TK.shape[1]]
        dy_RH = (grad_sorted_RH * weights_TK.flatten()[sorted_R][:, None]).to(y_RH.dtype)
        dweights_R = (grad_sorted_RH.to(weights_TK.dtype) * y_RH.to(weights_TK.dtype)).sum(dim=-1)
        return dy_RH, dweights_R[inverse_R].view_as(weights_TK), None, None
