"""RMS normalisation on a GPU, also fused with the deferred residual add before it, in one pass over memory.

Sum and norm are bound by memory. Fused, they read two tensors and write two; the backward pass reads three and writes
one, and sums the weight's gradient on the way instead of through a tensor of its own. The plain twin is
`p828.model.norm.RMSNorm` on a CPU.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("p828::add_rms_norm", mutates_args=())
def add_rms_norm(x_TH: Tensor, delta_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its normalisation times the weight (float32): both (T, H) in x's dtype."""
    from p828.kernels import norm_triton

    return norm_triton.forward(x_TH.contiguous(), delta_TH.contiguous(), weight_H, eps)


@add_rms_norm.register_fake
def _(x_TH: Tensor, delta_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape)


@torch.library.custom_op("p828::rms_norm", mutates_args=())
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The normalisation of x times the weight (float32): (T, H) in x's dtype."""
    from p828.kernels import norm_triton

    return norm_triton.forward(x_TH.contiguous(), None, weight_H, eps)[1]


@rms_norm.register_fake
def _(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


@torch.library.custom_op("p828::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_sum_TH: Tensor | None, grad_normed_TH: Tensor, sum_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is delta's too, and that of the weight (float32)."""
    from p828.kernels import norm_triton

    grad_sum_TH = None if grad_sum_TH is None else grad_sum_TH.contiguous()
    return norm_triton.backward(grad_sum_TH, grad_normed_TH.contiguous(), sum_TH.contiguous(), weight_H, eps)


@rms_norm_backward.register_fake
def _(
    grad_sum_TH: Tensor | None, grad_normed_TH: Tensor, sum_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return sum_TH.new_empty(sum_TH.shape), torch.empty_like(weight_H)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight_H, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight_H)
    ctx.set_materialize_grads(False)  # of the last layer's sum only the norm is used


def _backward(ctx: Any, grad_sum_TH: Tensor | None, grad_normed_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx_TH, dweight_H = rms_norm_backward(grad_sum_TH, grad_normed_TH, *ctx.saved_tensors, ctx.eps)
    return dx_TH, dx_TH, dweight_H, None


def _setup_alone(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x_TH, weight_H, ctx.eps = inputs
    ctx.save_for_backward(x_TH, weight_H)


def _backward_alone(ctx: Any, grad_normed_TH: Tensor) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward(None, grad_normed_TH, *ctx.saved_tensors, ctx.eps), None


add_rms_norm.register_autograd(_backward, setup_context=_setup)
rms_norm.register_autograd(_backward_alone, setup_context=_setup_alone)
