"""The AdamW kernel gives the bits of its plain twin."""

import math

import pytest
import torch

from p828.kernels.adamw import adamw_, bias_corrections, split_float32
from p828.kernels.adamw_state import MatrixState, Update


def to(state: MatrixState, device: torch.device) -> MatrixState:
    return MatrixState(*(tensor.to(device, copy=True) for tensor in state))


def make_update(updates: int, found_inf: bool, device: torch.device) -> Update:
    betas, count = (0.9, 0.95), torch.tensor(updates)
    scalars = (torch.tensor(0.37), torch.tensor(float(found_inf)), count, bias_corrections(betas, count))
    return Update(0.01, betas, 1e-8, *(scalar.to(device) for scalar in scalars))


@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 512), (5, 300, 333)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bits(cuda: torch.device, moment_dtype: torch.dtype, shape: tuple[int, ...], weight_decay: float) -> None:
    zeros = torch.zeros(shape, dtype=moment_dtype)
    twin = MatrixState(*split_float32(torch.randn(shape)), torch.zeros(shape), zeros, zeros.clone())
    state = to(twin, cuda)
    for updates in range(6):
        gradient = torch.randn(shape) * 10.0 ** (updates - 4)
        twin.gradient.copy_(gradient)
        state.gradient.copy_(gradient)
        adamw_(twin, make_update(updates, False, torch.device("cpu")), weight_decay, number=17)
        adamw_(state, make_update(updates, False, cuda), weight_decay, number=17)
        for name, ours, theirs in zip(MatrixState._fields, state, twin, strict=True):
            assert torch.equal(ours.cpu(), theirs), f"{name} after update {updates}"
    state.gradient[0] = math.nan
    adamw_(state, make_update(6, True, cuda), weight_decay, number=17)
    for name in ("weight", "low_bits", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(state, name).cpu(), getattr(twin, name)), name


def test_bias_corrections(cuda: torch.device) -> None:
    for updates in (0, 1, 10, 1000, 10**6):
        expected = bias_corrections((0.9, 0.999), torch.tensor(updates))
        actual = bias_corrections((0.9, 0.999), torch.tensor(updates, device=cuda))
        torch.testing.assert_close(actual.cpu(), expected, rtol=2**-23, atol=0)
