"""The kernels around the layers: the loss, the embedding's gradient, and AdamW."""

import torch
import torch.nn.functional as F

from p828.doctor.kernels.comparison import FLOAT32, Comparison, Place
from p828.kernels.adamw import adamw_, adamw_plain_, bias_corrections, join_float32, split_float32
from p828.kernels.adamw_state import MatrixState, Update
from p828.kernels.cross_entropy import softmax_gradient_
from p828.kernels.embedding import add_embedding_gradient_

SCALE = 0.37
BETAS, EPS, RATE, DECAY = (0.9, 0.95), 1e-8, 0.01, 0.1
NO_TARGET = -100
CPU = torch.device("cpu")


def cross_entropy(place: Place) -> list[Comparison]:
    """Losses and the logits' gradient, of rows with and without a target, against PyTorch's loss."""
    vocabulary = 4097
    logits_cV, targets_c = place.randn(20, vocabulary, scale=3.0), torch.arange(20) * 199
    targets_c[::5] = NO_TARGET
    twin = logits_cV.clone().requires_grad_()
    losses_c = F.cross_entropy(twin, targets_c, ignore_index=NO_TARGET, reduction="none")
    (SCALE * losses_c.sum()).backward()
    ours = place.leaf(logits_cV).detach()
    scale = torch.tensor(SCALE, device=place.device)
    actual_c = softmax_gradient_(ours, targets_c.to(place.device), scale)
    return [
        Comparison("losses", actual_c, losses_c, FLOAT32),
        Comparison("logits", ours, twin.grad, place.tolerance, is_gradient=True),
    ]


def embedding(place: Place) -> list[Comparison]:
    """The sum of the gradients of a token's places, against autograd's."""
    tokens_T, dx_TH = torch.arange(3000) * 31 % 11, place.randn(3000, 72)
    weight_VH = torch.zeros(50, 72, dtype=torch.float64, requires_grad=True)
    F.embedding(tokens_T, weight_VH).backward(dx_TH)
    sum_VH = torch.zeros(50, 72, device=place.device)
    add_embedding_gradient_(sum_VH, tokens_T.to(place.device), place.leaf(dx_TH).detach())
    return [Comparison("embedding", sum_VH, weight_VH.grad, FLOAT32, is_gradient=True)]


def adamw(place: Place) -> list[Comparison]:
    """Three updates of a bfloat16 matrix with its low bits, against PyTorch's AdamW in float64.

    With bfloat16 moments, which are rounded at random but repeatably, against the plain twin on the CPU, bit for bit.
    """
    first = torch.randn(65, 136, generator=place.generator)
    twin = first.double().requires_grad_()
    optimizer = torch.optim.AdamW([twin], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    state, small = (_state(first, dtype, place.device) for dtype in (torch.float32, torch.bfloat16))
    small_twin = _state(first, torch.bfloat16, CPU)
    for number in range(3):
        gradient = torch.randn(first.shape, generator=place.generator)
        twin.grad = SCALE * gradient.double()
        optimizer.step()
        for one in (state, small, small_twin):
            one.gradient.copy_(gradient)
        adamw_(state, _update(number, place.device), DECAY, number=1)
        adamw_(small, _update(number, place.device), DECAY, number=1)
        adamw_plain_(small_twin, _update(number, CPU), DECAY, number=1)
    return [
        Comparison("masters", join_float32(state.weight, state.low_bits), twin, FLOAT32),
        Comparison("moments", state.exp_avg, optimizer.state[twin]["exp_avg"], FLOAT32),
        Comparison("bfloat16 moments", small.exp_avg_sq, small_twin.exp_avg_sq, 0.0),
    ]


def _state(first: torch.Tensor, moments: torch.dtype, device: torch.device) -> MatrixState:
    """A matrix before its first update, with moments of this dtype."""
    zeros = [torch.zeros(first.shape, dtype=dtype) for dtype in (torch.float32, moments, moments)]
    return MatrixState(*(tensor.to(device) for tensor in (*split_float32(first), *zeros)))


def _update(updates: int, device: torch.device) -> Update:
    count = torch.tensor(updates)
    tensors = (torch.tensor(SCALE), torch.tensor(0.0), count, bias_corrections(BETAS, count))
    return Update(RATE, BETAS, EPS, *(tensor.to(device) for tensor in tensors))
