"""Fused SwiGLU and down projection of the shared experts on a GPU, which keeps gate and up projections only.

The gradient of the down projection's weight needs the activation. The backward pass computes it again at no cost, since
the activation's gradient reads gate and up anyway; `torch.compile` would keep it, 67 MB a layer at the sizes of
`800m`. The plain twin is `p828.model.experts.SharedExperts.forward` on a CPU.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("p828::swiglu_down", mutates_args=())
def swiglu_down(gate_TP: Tensor, up_TP: Tensor, down_HI: Tensor) -> Tensor:
    """act(gate, up) downᵀ: (T, H); P is I for `swiglu` and 2 I for `swiglu_of_product`. All of one dtype."""
    from p828.kernels.moe import swiglu_triton

    return swiglu_triton.activate(gate_TP.contiguous(), up_TP.contiguous(), down_HI.shape[1]) @ down_HI.T


@swiglu_down.register_fake
def _(gate_TP: Tensor, up_TP: Tensor, down_HI: Tensor) -> Tensor:
    return gate_TP.new_empty(len(gate_TP), len(down_HI))


@torch.library.custom_op("p828::swiglu_down_backward", mutates_args=())
def swiglu_down_backward(
    grad_TH: Tensor, gate_TP: Tensor, up_TP: Tensor, down_HI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate_TP, up_TP and down_HI."""
    from p828.kernels.moe import swiglu_triton

    gate_TP, up_TP = gate_TP.contiguous(), up_TP.contiguous()
    dgate_TP, dup_TP = torch.empty_like(gate_TP), torch.empty_like(up_TP)
    inner_TI = grad_TH @ down_HI  # its gradient, so far
    swiglu_triton.activate_backward_(inner_TI, gate_TP, up_TP, dgate_TP, dup_TP)
    return dgate_TP, dup_TP, grad_TH.T @ inner_TI


@swiglu_down_backward.register_fake
def _(grad_TH: Tensor, gate_TP: Tensor, up_TP: Tensor, down_HI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gate_TP.new_empty(gate_TP.shape), up_TP.new_empty(up_TP.shape), down_HI.new_empty(down_HI.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return swiglu_down_backward(grad_TH, *ctx.saved_tensors)


swiglu_down.register_autograd(_backward, setup_context=_setup)
