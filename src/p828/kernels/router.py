"""The router on a GPU: its float32 product on the tensor cores, and its choice.

A float32 product of (T, H) by a few experts runs on the plain cores and first needs the tokens in float32: 150 µs a
layer at 16,384 tokens of 1,024 on an H100, backward included, for 1.6 GFLOP. A float32 weight is the sum of three
bfloat16 numbers, without a rest, and products of bfloat16 numbers are exact in float32, so one product of the bfloat16
tokens with the three parts side by side gives what the float32 product gives. In the backward pass the weight's
gradient takes the logits' gradient in two parts, 16 bits; the tokens' gradient is a bfloat16 product like any other.
The plain twins are `F.linear` in float32 and `torch.topk`.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("p828::router_logits", mutates_args=())
def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x Wᵀ of bfloat16 tokens and a float32 weight on CUDA: float32 (T, E)."""
    parts_XH = _split(weight_EH, 3)  # X counts the parts of all experts
    return torch.mm(x_TH, parts_XH.T, out_dtype=torch.float32).unflatten(1, (3, -1)).sum(1)


@router_logits.register_fake
def _(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return weight_EH.new_empty(len(x_TH), len(weight_EH))


@torch.library.custom_op("p828::router_logits_backward", mutates_args=())
def router_logits_backward(grad_TE: Tensor, x_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x_TH (bfloat16) and weight_EH (float32)."""
    grad_XT = _split(grad_TE.T, 2)
    dx_TH = grad_XT[: len(weight_EH)].T @ weight_EH.bfloat16()
    return dx_TH, torch.mm(grad_XT, x_TH, out_dtype=torch.float32).unflatten(0, (2, -1)).sum(0)


@router_logits_backward.register_fake
def _(grad_TE: Tensor, x_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TH), torch.empty_like(weight_EH)


def _split(values_EX: Tensor, parts: int) -> Tensor:
    """Float32 (E, X) as a sum of bfloat16 parts, the largest first: (parts · E, X)."""
    found, rest = [], values_EX
    for _ in range(parts):
        found.append(rest.bfloat16())
        rest = rest - found[-1]
    return torch.cat(found)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    return router_logits_backward(grad_TE, *ctx.saved_tensors)


router_logits.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("p828::choose_experts", mutates_args=())
def choose_experts(scores_TE: Tensor, per_token: int) -> Tensor:
    """The `per_token` highest of each row on CUDA, as `torch.topk` gives them: int64 (T, K)."""
    from p828.kernels import router_triton

    return router_triton.choose(scores_TE.contiguous(), per_token)


@choose_experts.register_fake
def _(scores_TE: Tensor, per_token: int) -> Tensor:
    return scores_TE.new_empty(len(scores_TE), per_token, dtype=torch.int64)
