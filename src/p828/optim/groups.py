"""Which parameters are treated alike, and the bytes that training keeps of each such group.

None of it needs an engine: a model on PyTorch's meta device, which has shapes and no memory, is enough.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from p828.config import OptimizerConfig
from p828.model.precision import matrices

MOMENTS = 2  # of AdamW


class Group(NamedTuple):
    """What the optimizer asks of a parameter."""

    decays: bool
    """Under weight decay: matrices do; norms, sinks and, unless `decay_embeddings` is on, the embedding do not."""
    is_split: bool
    """Stored as a bfloat16 weight and the low bits of its float32 master. Otherwise the weight is float32."""
    is_embedding: bool
    """The token embedding, which is also the head if the two are tied."""


class GroupBytes(NamedTuple):
    """Bytes that a group takes on one device that holds all of it."""

    weights: int
    """What the layers compute with: bfloat16 where the parameter is split, else float32."""
    low_bits: int
    """What the float32 masters have beyond the weights, int16. Without a split the weight itself is the master."""
    gradients: int
    """float32 sums over a step's micro-batches."""
    moments: int
    """AdamW's two, without its count of updates."""


def parameter_groups(model: nn.Module, config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Group]:
    """Every parameter's group by the parameter's name, in the model's order, if layers compute in `dtype`."""
    split = {name for name, _ in matrices(model)} if dtype == torch.bfloat16 else set()
    groups = {}
    for name, parameter in model.named_parameters():
        is_embedding = "embed_tokens" in name
        decays = parameter.ndim >= 2 and (config.decay_embeddings or not is_embedding)
        groups[name] = Group(decays, name in split, is_embedding)
    return groups


def group_bytes(model: nn.Module, groups: Mapping[str, Group], moment_dtype: torch.dtype) -> dict[Group, GroupBytes]:
    """Bytes of each group of `groups`, which names the parameters of `model`.

    Matrices that are split have moments of `moment_dtype`, all other parameters float32 ones.
    """
    numbers: dict[Group, int] = {}
    for name, parameter in model.named_parameters():
        numbers[groups[name]] = numbers.get(groups[name], 0) + parameter.numel()
    float32, bfloat16, int16 = (dtype.itemsize for dtype in (torch.float32, torch.bfloat16, torch.int16))
    return {
        group: GroupBytes(
            weights=count * (bfloat16 if group.is_split else float32),
            low_bits=count * int16 if group.is_split else 0,
            gradients=count * float32,
            moments=count * MOMENTS * (moment_dtype.itemsize if group.is_split else float32),
        )
        for group, count in numbers.items()
    }
