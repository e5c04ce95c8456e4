"""Initial weights."""

import math

import torch
from torch import nn

from p828.model.transformer import Transformer

ROUTER_SHARE = 0.1  # a router that starts near even lets the balance bias, not chance, decide the first loads


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, the same on every device when called before the model is moved.

    normal(0, initializer_range); what writes to the residual stream (attention's output, W2) is scaled by
    1 / sqrt(2 L) as in GPT-2; the router is a tenth of it; norms are one, sinks and balance bias zero.
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.zeros_(parameter)
        elif name.endswith(("norm.weight", "layernorm.weight")):
            nn.init.ones_(parameter)
        elif name.endswith("gate.weight"):
            nn.init.normal_(parameter, 0.0, std * ROUTER_SHARE, generator=generator)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.normal_(parameter, 0.0, residual_std, generator=generator)
        else:
            nn.init.normal_(parameter, 0.0, std, generator=generator)
