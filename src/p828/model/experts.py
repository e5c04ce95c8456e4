"""The mixture of experts: permute routed tokens by expert, a grouped GEMM of each expert's rows, and unpermute.

No token is dropped; an expert without tokens is a normal case.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.kernels.moe.grouped_gemm_cpu import grouped_linear, grouped_mm
from p828.kernels.moe.ops import align_to_blocks, routed_experts
from p828.kernels.moe.swiglu_down import swiglu_down
from p828.kernels.moe.tiles import TILE
from p828.model.backend import ExpertsBackend, experts_backend
from p828.model.costs import projected_width
from p828.model.linear import Linear


class TokenPermutation(NamedTuple):
    """Which row each routed token gets when they are sorted by expert; entry i is choice i % K of token i // K."""

    destination_TK: Tensor
    """int: the destination row of every choice."""
    source_R: Tensor
    """int: the source index of each row, an entry; −1 in padding rows, which fill an expert's last block."""
    offsets_E1: Tensor
    """int (E + 1,): where each expert's rows begin, and where the last one's end."""
    tile_expert: Tensor | None
    """int: the expert that each block of TILE rows belongs to; None without padding."""
    loads_E: Tensor
    """int64: the tokens that each expert received, padding left out."""


class Experts(nn.Module):
    """W2(dropout(act(W1 x))) for every routed expert, in two stacked tensors; W1 is gate and up projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_act, self.dropout = config.hidden_act, config.dropout
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        projected = projected_width(config.hidden_act, inner)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * projected, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def permutation(self, x_TH: Tensor, experts_TK: Tensor, valid_token_T: Tensor | None) -> TokenPermutation:
        """The permutation that `forward` needs for these tokens. `valid_token_T` (bool) leaves padding out of the
        loads; it defaults to all tokens."""
        experts = len(self.down_proj)
        if valid_token_T is None:
            valid_token_T = torch.ones(len(x_TH), dtype=torch.bool, device=x_TH.device)
        if self._backend(x_TH) != "triton":
            return sort_by_expert(experts_TK, valid_token_T, experts)
        tiles = -(-experts_TK.numel() // TILE) + experts  # no expert pads more than a tile
        return TokenPermutation(*align_to_blocks(experts_TK, valid_token_T, experts, tiles * TILE))

    def forward(self, x_TH: Tensor, weights_TK: Tensor, permutation: TokenPermutation) -> Tensor:
        gate_up, down = self.gate_up_proj.to(x_TH.dtype), self.down_proj.to(x_TH.dtype)
        if permutation.tile_expert is not None:
            return routed_experts(x_TH, weights_TK, gate_up, down, *permutation[:4])[0]
        rows_E = permutation.offsets_E1.diff()
        x_RH = PermuteTokens.apply(x_TH, permutation.destination_TK, permutation.source_R)
        product = grouped_linear if self._backend(x_TH) == "loop" else grouped_mm
        gate_RP, up_RP = product(x_RH, gate_up, rows_E).chunk(2, dim=-1)
        inner_RI = F.dropout(activate(self.hidden_act, gate_RP, up_RP), self.dropout, self.training)
        # Weighted before the last product: the sum over a token's experts is then the transpose of `PermuteTokens`.
        weighted_RI = (inner_RI * weights_TK.flatten()[permutation.source_R, None]).to(x_TH.dtype)
        return UnpermuteTokens.apply(
            product(weighted_RI, down, rows_E), permutation.destination_TK, permutation.source_R
        )

    def _backend(self, x_TH: Tensor) -> ExpertsBackend:
        drops = self.training and self.dropout > 0
        return experts_backend(self.hidden_act, x_TH.device, x_TH.dtype, drops)


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
        gate_TP, up_TP = self.gate_proj(x_TH), self.up_proj(x_TH)
        drops = self.training and self.dropout > 0
        if experts_backend(self.hidden_act, x_TH.device, x_TH.dtype, drops) == "triton":
            return swiglu_down(gate_TP, up_TP, self.down_proj.weight.to(x_TH.dtype))
        inner_TI = activate(self.hidden_act, gate_TP, up_TP)
        return self.down_proj(F.dropout(inner_TI, self.dropout, self.training))


def activate(hidden_act: str, gate_P: Tensor, up_P: Tensor) -> Tensor:
    """`swiglu`: silu(gate) ⊙ up, P = I. `swiglu_of_product`: SwiGLU over the two halves of gate ⊙ up, P = 2 I."""
    if hidden_act == "swiglu_of_product":
        gate_P, up_P = (gate_P * up_P).chunk(2, dim=-1)
    return F.silu(gate_P) * up_P


def sort_by_expert(experts_TK: Tensor, valid_token_T: Tensor, n_routed_experts: int) -> TokenPermutation:
    """The stable order of the routed tokens by expert, without padding: within an expert, tokens keep their order."""
    chosen_R = experts_TK.flatten()
    source_R = chosen_R.argsort(stable=True)
    row_R = torch.empty_like(source_R).scatter_(0, source_R, torch.arange(len(source_R), device=source_R.device))
    is_chosen_TKE = experts_TK[..., None] == torch.arange(n_routed_experts, device=chosen_R.device)
    offsets_E1 = F.pad(is_chosen_TKE.sum(dim=(0, 1)).cumsum(0), (1, 0))
    loads_E = (is_chosen_TKE & valid_token_T[:, None, None]).sum(dim=(0, 1))
    return TokenPermutation(row_R.view_as(experts_TK), source_R, offsets_E1, None, loads_E)


class PermuteTokens(torch.autograd.Function):
    """(T, H) to (R, H): each token's row, once for every expert that it goes to.

    Why our own: the backward pass of plain indexing adds with atomics or sorts. As the destination of each choice is
    known, the gradient is `UnpermuteTokens`: a gather and a sum over K, always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, destination_TK: Tensor, source_R: Tensor) -> Tensor:
        ctx.save_for_backward(destination_TK, source_R)
        return permute(x_TH, destination_TK, source_R)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None]:
        return unpermute(grad_RH, ctx.saved_tensors[0]), None, None


class UnpermuteTokens(torch.autograd.Function):
    """(R, H) to (T, H): the sum over a token's experts; the transpose of `PermuteTokens`."""

    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, destination_TK: Tensor, source_R: Tensor) -> Tensor:
        ctx.save_for_backward(destination_TK, source_R)
        return unpermute(y_RH, destination_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        return permute(grad_TH, *ctx.saved_tensors), None, None


def permute(x_TH: Tensor, destination_TK: Tensor, source_R: Tensor) -> Tensor:
    return x_TH.index_select(0, source_R // destination_TK.shape[1])


def unpermute(y_RH: Tensor, destination_TK: Tensor) -> Tensor:
    return y_RH.index_select(0, destination_TK.flatten()).unflatten(0, destination_TK.shape).sum(dim=1)
