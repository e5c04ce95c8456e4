"""Initial weights."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.model.transformer import Transformer

ROUTER_SHARE = 0.1  # a router that starts near even lets the balance bias, not chance, decide the first loads


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, the same on every device when called before the model is moved.

    normal(0, initializer_range); what writes to the residual stream (attention's output, W2) is scaled by
    1 / sqrt(2 L) as in GPT-2; the router is a tenth of it; norms are one, sinks and balance bias zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, model.config, generator)


def initial_values(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What `initialise` fills a model with, one parameter after the other: name and float32 values on the CPU."""
    with torch.device("meta"):
        model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape)
        _fill(name, values, config, generator)
        yield name, values


def _fill(name: str, values: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    std = config.initializer_range
    if name.endswith("sinks"):
        nn.init.zeros_(values)
    elif name.endswith(("norm.weight", "layernorm.weight")):
        nn.init.ones_(values)
    elif name.endswith("gate.weight"):
        nn.init.normal_(values, 0.0, std * ROUTER_SHARE, generator=generator)
    elif "o_proj" in name or "down_proj" in name:
        nn.init.normal_(values, 0.0, std / math.sqrt(2 * config.num_hidden_layers), generator=generator)
    else:
        nn.init.normal_(values, 0.0, std, generator=generator)
