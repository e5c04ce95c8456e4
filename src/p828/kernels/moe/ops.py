"""The routed experts of a layer on the GPU: permute, grouped GEMM, SwiGLU, grouped GEMM, unpermute.

The router's weight is applied to the activation, before the second product, not after it. The result is the same, and
no expert's output has to be kept: the gradient of the router's weight is the dot product
of the activation with its own gradient, and the backward pass has both. The backward pass keeps the result of the first
product only. It computes the permuted rows and the activation again, which costs a pass over memory and no product.

`torch.compile` sees two operations, so that this file decides what is fused and what is kept. Triton is imported
inside them: machines without a GPU do not have it. The plain twin is `p828.model.experts.Experts.forward` on a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from p828.kernels.moe.tiles import TILE


@torch.library.custom_op("p828::sort_rows", mutates_args=())
def align_to_blocks(
    experts_TK: Tensor, valid_token_T: Tensor, n_experts: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `p828.model.experts.TokenPermutation`, each expert's rows padded to blocks of TILE rows."""
    from p828.kernels.moe import layout_triton

    return layout_triton.align_to_blocks(experts_TK.contiguous(), valid_token_T.contiguous(), n_experts, rows, TILE)


@align_to_blocks.register_fake
def _(
    experts_TK: Tensor, valid_token_T: Tensor, n_experts: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return experts_TK.new_empty(size, dtype=dtype)

    return (
        empty(*experts_TK.shape), empty(rows), empty(n_experts + 1), empty(rows // TILE),
        empty(n_experts, dtype=torch.int64),
    )  # fmt: skip


@torch.library.custom_op("p828::routed_experts", mutates_args=())
def routed_experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    gate_up_EPH: Tensor,
    down_EHI: Tensor,
    destination_TK: Tensor,
    source_R: Tensor,
    offsets_E1: Tensor,
    tile_expert: Tensor,
) -> tuple[Tensor, Tensor]:
    """Σ_k weight · W2 act(W1 x): (T, H) in x's dtype; and the first product (R, P), which the backward pass needs.

    `weights_TK` is float32; P is 2 I for `swiglu` and 4 I for `swiglu_of_product`.
    """
    from p828.kernels.moe import grouped_gemm_triton, permute_triton, swiglu_triton

    x_TH, weights_TK, rows_used = x_TH.contiguous(), weights_TK.contiguous(), offsets_E1[-1:]
    x_RH = permute_triton.permute(x_TH, source_R, rows_used, destination_TK.shape[1])
    gate_up_RP = grouped_gemm_triton.linear(x_RH, gate_up_EPH, tile_expert, rows_used)
    gate_RP, up_RP = gate_up_RP.chunk(2, dim=1)
    inner_RI = swiglu_triton.activate(gate_RP, up_RP, down_EHI.shape[2], weights_TK, source_R, rows_used)
    y_RH = grouped_gemm_triton.linear(inner_RI, down_EHI, tile_expert, rows_used)
    return permute_triton.unpermute(y_RH, destination_TK), gate_up_RP


@routed_experts.register_fake
def _(x_TH: Tensor, weights_TK: Tensor, gate_up_EPH: Tensor, down_EHI: Tensor, destination_TK: Tensor, source_R: Tensor,
      offsets_E1: Tensor, tile_expert: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(len(source_R), gate_up_EPH.shape[1])


@torch.library.custom_op("p828::routed_experts_backward", mutates_args=())
def routed_experts_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    gate_up_EPH: Tensor,
    down_EHI: Tensor,
    destination_TK: Tensor,
    source_R: Tensor,
    offsets_E1: Tensor,
    tile_expert: Tensor,
    gate_up_RP: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_TH, weights_TK, gate_up_EPH and down_EHI, each in its dtype."""
    from p828.kernels.moe import grouped_gemm_triton, permute_triton, swiglu_triton

    grad_TH, x_TH, weights_TK = grad_TH.contiguous(), x_TH.contiguous(), weights_TK.contiguous()
    rows_used, per_token = offsets_E1[-1:], destination_TK.shape[1]
    grad_RH = permute_triton.permute(grad_TH, source_R, rows_used, per_token)
    inner_RI = grouped_gemm_triton.linear_backward(grad_RH, down_EHI, tile_expert, rows_used)  # its gradient, so far
    dgate_up_RP, dweights_TK = torch.empty_like(gate_up_RP), torch.empty_like(weights_TK)
    (gate_RP, up_RP), (dgate_RP, dup_RP) = gate_up_RP.chunk(2, dim=1), dgate_up_RP.chunk(2, dim=1)
    swiglu_triton.activate_backward_(
        inner_RI, gate_RP, up_RP, dgate_RP, dup_RP, weights_TK, dweights_TK, source_R, rows_used
    )
    ddown_EHI = grouped_gemm_triton.weight_gradient(grad_RH, inner_RI, offsets_E1)
    del grad_RH, inner_RI
    dx_RH = grouped_gemm_triton.linear_backward(dgate_up_RP, gate_up_EPH, tile_expert, rows_used)
    dx_TH = permute_triton.unpermute(dx_RH, destination_TK)
    del dx_RH
    x_RH = permute_triton.permute(x_TH, source_R, rows_used, per_token)
    return dx_TH, dweights_TK, grouped_gemm_triton.weight_gradient(dgate_up_RP, x_RH, offsets_E1), ddown_EHI


@routed_experts_backward.register_fake
def _(grad_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, gate_up_EPH: Tensor, down_EHI: Tensor, destination_TK: Tensor,
      source_R: Tensor, offsets_E1: Tensor, tile_expert: Tensor, gate_up_RP: Tensor,
      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx_TH, dweights_TK, dgate_up_EPH, ddown_EHI = (
        x.new_empty(x.shape) for x in (x_TH, weights_TK, gate_up_EPH, down_EHI)
    )
    return dx_TH, dweights_TK, dgate_up_EPH, ddown_EHI


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_TH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = routed_experts_backward(grad_TH, *ctx.saved_tensors)
    return *grads, None, None, None, None


routed_experts.register_autograd(_backward, setup_context=_setup)
