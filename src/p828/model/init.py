"""Initial weights."""

import math

import torch
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.model.random_normal import fill_normal_, make_key
from p828.model.transformer import Transformer

ROUTER_SHARE = 0.1  # a router that starts near even lets the balance bias, not chance, decide the first loads


def initial_model(config: ModelConfig, device: torch.device, seed: int) -> Transformer:
    """A model on `device` with its initial weights, float32.

    On a GPU it is made there: a large model would take the host most of a minute.
    """
    if device.type != "cuda":
        model = Transformer(config)
    else:
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device=device)
        model.reset_buffers(device)
    initialise(model, seed)
    return model


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, on its device: the same values on every device.

    normal(0, initializer_range); what writes to the residual stream (attention's output, W2) is scaled by
    1 / sqrt(2 L) as in GPT-2; the router is a tenth of it; norms are one, sinks and balance bias zero.
    """
    for name, parameter in model.named_parameters():
        initialise_slice(parameter.data, name, model.config, seed)


def initialise_slice(values: Tensor, name: str, config: ModelConfig, seed: int, start: int = 0) -> None:
    """Fill `values` (float32, contiguous) with what `initialise` gives a part of the parameter `name`.

    The part begins at the number `start` of the flattened parameter. A parameter's values depend on its name and the
    seed, not on the other parameters.
    """
    std = config.initializer_range
    if name.endswith("sinks"):
        nn.init.zeros_(values)
        return
    if name.endswith(("norm.weight", "layernorm.weight")):
        nn.init.ones_(values)
        return
    if name.endswith("gate.weight"):
        std *= ROUTER_SHARE
    elif "o_proj" in name or "down_proj" in name:
        std /= math.sqrt(2 * config.num_hidden_layers)
    fill_normal_(values, std, make_key(seed, name), start)
