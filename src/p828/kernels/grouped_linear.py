"""One linear layer per expert over rows sorted by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_RA: Tensor, weight_EBA: Tensor, loads_E: Tensor) -> Tensor:
    """Rows of expert e times weight e, transposed: (R, A) and (E, B, A) give (R, B).

    `x_RA` holds the rows of expert 0 first, then those of expert 1, …; `loads_E` (int64, sums to R) says how many each
    has, zero among them. bfloat16 on CUDA runs as one grouped product without the host knowing the loads; on a CPU,
    where that product is no faster, and in other dtypes it is a loop.
    """
    if x_RA.is_cuda and x_RA.dtype == torch.bfloat16:
        offsets_E = loads_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_RA, weight_EBA.transpose(1, 2), offs=offsets_E)
    return grouped_linear_loop(x_RA, weight_EBA, loads_E)


def grouped_linear_loop(x_RA: Tensor, weight_EBA: Tensor, loads_E: Tensor) -> Tensor:
    """The plain twin: a linear layer per expert, on any device in any dtype."""
    rows = x_RA.split(loads_E.tolist())
    # One unbind, not E selections: the backward of a selection fills a whole (E, B, A) tensor each time.
    return torch.cat([F.linear(x, weight) for x, weight in zip(rows, weight_EBA.unbind(), strict=True)])
